"""The eight compass directions, and great-circle geometry in degrees and miles."""

import numpy as np

DIRECTIONS = ("N", "NE", "E", "SE", "S", "SW", "W", "NW")
EARTH_RADIUS_MILES = 3958.7613  # mean radius of the WGS 84 ellipsoid, 6,371.0088 km


def compass_direction(
    lat_a: np.ndarray, lon_a: np.ndarray, lat_b: np.ndarray, lon_b: np.ndarray
) -> np.ndarray:
    """Index in DIRECTIONS of the initial great-circle bearing from a to b (degrees), any
    broadcastable shapes.

    Sectors of 45 degrees centred on the compass points: N is within 22.5 degrees of north, and the lower bound of a
    sector belongs to it.  The bearing of a point to itself is 0 by convention (N).
    """
    phi_a, phi_b = np.radians(lat_a), np.radians(lat_b)
    delta = np.radians(np.subtract(lon_b, lon_a))
    east = np.sin(delta) * np.cos(phi_b)
    north = np.cos(phi_a) * np.sin(phi_b) - np.sin(phi_a) * np.cos(phi_b) * np.cos(delta)
    degrees = np.degrees(np.arctan2(east, north)) % 360.0
    return (np.floor((degrees + 22.5) / 45.0) % len(DIRECTIONS)).astype(np.int64)


def great_circle_miles(
    lat_a: np.ndarray, lon_a: np.ndarray, lat_b: np.ndarray, lon_b: np.ndarray
) -> np.ndarray:
    """Haversine distance in miles between points given in degrees, any broadcastable shapes."""
    phi_a, phi_b = np.radians(lat_a), np.radians(lat_b)
    delta = np.radians(np.subtract(lon_b, lon_a))
    chord = (
        np.sin((phi_b - phi_a) / 2) ** 2 + np.cos(phi_a) * np.cos(phi_b) * np.sin(delta / 2) ** 2
    )
    return 2 * EARTH_RADIUS_MILES * np.arcsin(np.sqrt(np.clip(chord, 0.0, 1.0)))
