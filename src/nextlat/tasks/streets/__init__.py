"""Streets: a city learned from rides alone (Vafa et al., arXiv 2406.03689; Manhattan in arXiv
2511.05963)."""
