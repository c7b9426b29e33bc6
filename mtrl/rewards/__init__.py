"""How good a completion is: rewards by name, or a user's own ``module:function``."""

from mtrl.rewards.functions import exact_match, numeric_match
from mtrl.rewards.registry import ItemReward, Reward, load_reward, per_item, shuffled

__all__ = ["ItemReward", "Reward", "exact_match", "load_reward", "numeric_match", "per_item", "shuffled"]
