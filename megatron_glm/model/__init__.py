"""The GLM architecture as modules for the slots of Megatron's GPTModel."""
