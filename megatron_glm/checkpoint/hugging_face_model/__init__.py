"""What an exported checkpoint carries with it: files that stand alone, copied as they are."""


def register() -> None:
    """Makes transformers open exports with this package's code instead of the folder's, so that
    nobody has to pass `trust_remote_code`."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    from megatron_glm.checkpoint.hugging_face_model.configuration_megatron_glm import (
        MegatronGLMConfig,
    )
    from megatron_glm.checkpoint.hugging_face_model.modeling_megatron_glm import (
        MegatronGLMForCausalLM,
        MegatronGLMModel,
    )
    from megatron_glm.checkpoint.hugging_face_model.tokenization_megatron_glm import (
        MegatronGLMTokenizer,
    )

    AutoConfig.register(MegatronGLMConfig.model_type, MegatronGLMConfig, exist_ok=True)
    AutoModel.register(MegatronGLMConfig, MegatronGLMModel, exist_ok=True)
    AutoModelForCausalLM.register(MegatronGLMConfig, MegatronGLMForCausalLM, exist_ok=True)
    AutoTokenizer.register(
        MegatronGLMConfig, slow_tokenizer_class=MegatronGLMTokenizer, exist_ok=True
    )
