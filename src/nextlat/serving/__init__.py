"""Serving a saved model elsewhere: in vLLM with its latent dynamics model as the drafter.

`draft_config` writes what a server reads beside the weights, `vllm` is the drafter, `cpu_sampling`
mends a fault of vLLM's CPU package, `serve` starts a server.
"""

ARCHITECTURE = "EagleNextLatForCausalLM"  # vLLM wants the prefix "Eagle" on a draft model


def register() -> None:
    """Entry point of the group `vllm.general_plugins`, called in each of vLLM's processes.

    The class stays a name here: vLLM imports it where a draft model asks for it.
    """
    from vllm import ModelRegistry

    ModelRegistry.register_model(ARCHITECTURE, "nextlat.serving.vllm:EagleNextLat")
