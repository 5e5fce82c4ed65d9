"""Rewards: from a waveform and its prompt to a number. `load_reward` reads one from a line of configuration.

`base` the contract, `clap` and `lalm` the two models, `fine` what the second is asked beyond the caption, `lalm_training` how it
is trained, `rules` for transcripts, `recognisers` the ears that write them.
"""

from resonate_lib.rewards.base import Checked, Reward, RewardResult, WeightedMix, check_result, load_reward

__all__ = ["Checked", "Reward", "RewardResult", "WeightedMix", "check_result", "load_reward"]
