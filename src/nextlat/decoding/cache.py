"""The key-value cache of one sequence, and taking rejected tokens out of it again.

The only part of decoding that knows the caches of `transformers`. Measured on 5.17 and 5.23: `crop` takes the number of tokens
to remove as a NEGATIVE number (a positive one is an error, or in 5.17 a length to keep), and layers with a sliding window or a
convolution throw their past away unless they were told beforehand to record it; those then have to be cropped after every
forward pass, by zero tokens too, because only `crop` brings them back to their working size.
"""

from transformers import Cache, DynamicCache, PreTrainedConfig

from nextlat.errors import NextLatError


def recording_cache(config: PreTrainedConfig) -> DynamicCache:
    """An empty cache for a model with this config, which can forget tokens through `roll_back`."""
    cache = DynamicCache(config=config)
    cache.activate_past_recording()
    return cache


def check_rollback(cache: Cache) -> None:
    """Refuse a filled cache that cannot forget tokens, as that of a recurrent layer, whose state sums up all of its past.

    Called after the first forward pass: a recurrent layer does not know what it stores before.

    Raises:
        NextLatError: with the way out.
    """
    if not cache.is_croppable:
        raise NextLatError("this model has recurrent layers, whose state cannot forget a rejected draft: use draft_length=0")


def roll_back(cache: Cache, tokens: int) -> None:
    """Forget the last `tokens` tokens, 0 included; to be called once after every forward pass of a recording cache."""
    cache.crop(-tokens)
