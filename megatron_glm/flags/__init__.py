"""GLM's flags beside Megatron's, and which of Megatron's GLM refuses, with which cure."""
