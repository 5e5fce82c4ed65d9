"""Reinforcement learning for speech language models: recognition and synthesis by one kind of policy."""
