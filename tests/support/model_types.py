"""What the tests establish of each model type; `docs/models.md` is made from this."""

from __future__ import annotations

NEWEST = "5.24"  # the release of transformers that these tables were filled with; older ones lack some types

# Checked against the oracle, one by one.
_EXACT = """
    apertus1p5 aria aya_vision chameleon cohere2_vision cohere_compass cosmos3_edge cosmos3_omni deepseek_ocr2 deepseek_vl
    deepseek_vl_hybrid emu3 ernie4_5_vl_moe exaone4_5 fast_vlm fuyu gemma3 glm46v glm4v glm4v_moe glm_ocr glmga
    got_ocr2 granite4_vision granite_docling hunyuan_vl hyperclovax_vision_v2 idefics2 idefics3 internvl janus
    kimi_k25 lighton_ocr llava llava_next llava_next_video llava_onevision mistral3 molmo2 muse_glimmer muse_spark
    ovis2 paddleocr_vl paligemma perception_lm pp_chart2table qianfan_ocr qwen2_5_omni_thinker qwen2_5_vl qwen2_vl
    qwen3_omni_moe_thinker qwen3_vl qwen3_vl_moe shieldgemma2 smolvlm step3p7 video_llama_3 video_llava vipllava
"""
# Those of them that have a placeholder of its own for videos.
_VIDEOS = """
    cohere_compass cosmos3_edge cosmos3_omni ernie4_5_vl_moe exaone4_5 glm46v glm4v glm4v_moe glm_ocr glmga
    hyperclovax_vision_v2 kimi_k25 llava_next_video llava_onevision muse_glimmer muse_spark paddleocr_vl perception_lm
    qwen2_5_omni_thinker qwen2_5_vl qwen2_vl qwen3_omni_moe_thinker qwen3_vl qwen3_vl_moe video_llama_3 video_llava
"""
EXACT, VIDEOS = tuple(_EXACT.split()), tuple(_VIDEOS.split())
# Exact with visual_mask: decoders alone, in whose prompts nothing says which tokens are visual.
ALONE = ("mistral4",)
# Models of gap_triton.models, which transformers doesn't have: exact on checkpoints in their authors' layout.
PUBLISHED = ("shikra", "minigpt_v2")
# Exact before the decoder, which is handed the survivors alone; with a part of what says why not at any of its layers.
RECURRENT = "carries a recurrent state"
CONVOLUTION = "mixes neighbouring tokens by"
INDEX = "by an index of its own which tokens"
NOT_PLAIN = {
    "dots3_note": INDEX,
    "gemma4": "keys and values of an earlier layer",
    "gemma4_unified": "keys and values of an earlier layer",
    "glm5_next": RECURRENT,
    "hy_v4_vl": INDEX,
    "inkling2": CONVOLUTION,
    "inkling2_loop": CONVOLUTION,
    "lfm2_vl": CONVOLUTION,
    "lfm3_vl": CONVOLUTION,
    "llama4": "attends in chunks",
    "minicpm_ocr": RECURRENT,
    "minicpmv4_6": RECURRENT,
    "minicpmv4_7": RECURRENT,
    "minimax_m3_vl": "by an index of its own which blocks of tokens",
    "mistral_large4": INDEX,
    "nemotron_h_omni": RECURRENT,
    "qwen3_5": RECURRENT,
    "qwen3_5_moe": RECURRENT,
    "qwen4_exp": RECURRENT,
    "unlimited_ocr": "slides over answers only",
}
# Releases before these have layers of other kinds in them, or fail on them.
NOT_PLAIN_SINCE = {"glm5_next": "5.24", "qwen4_exp": "5.24"}
# Those of them that are exact in the decoder too, at these layers of the tests' models: with attention, and without keys of
# earlier layers behind them.
PRUNING_LAYERS = {
    "gemma4": (0,),
    "gemma4_unified": (0, 1, 2, 3),
    "lfm2_vl": (1, 2, 3),
    "lfm3_vl": (1, 2),
    "minicpm_ocr": (1, 3),
    "minicpmv4_6": (1, 3),
    "minicpmv4_7": (1, 3),
    "nemotron_h_omni": (2,),
    "qwen3_5": (1, 3),
    "qwen3_5_moe": (1, 3),
}
# Those of them whose tokens only attention mixes, so that masking columns says what is right.
MASKED = ("gemma4", "gemma4_unified", "llama4")
LOOKS_AHEAD = ("gemma4_unified",)  # its images see all of themselves
# Those whose attention knows the names of implementations, or is more than dense: attached, and not loaded by name.
OWN_ATTENTION = (
    "dots3_note",
    "glm5_next",
    "hy_v4_vl",
    "inkling2",
    "inkling2_loop",
    "minimax_m3_vl",
    "mistral_large4",
)
# Refused, with a part of the sentence that says why.
CROSS_ATTENTION = "reads the image through cross-attention"
NO_STACK = "found no vision-language decoder"
SECOND = "a second decoder"
REFUSED = {
    "blip": CROSS_ATTENTION,
    "blip-2": NO_STACK,
    "diffusion_gemma": SECOND,
    "evolla": "EvollaDecoderLayer.forward takes|found no",
    "florence2": CROSS_ATTENTION,
    "git": NO_STACK,
    "idefics": CROSS_ATTENTION,
    "instructblip": NO_STACK,
    "instructblipvideo": NO_STACK,
    "kosmos-2": "encoder_hidden_states|found no",
    "kosmos-2.5": "puts image features in by itself|found no",
    "mllama": CROSS_ATTENTION,
    "pi0": SECOND,
    "pix2struct": CROSS_ATTENTION,
    "pp_formulanet": CROSS_ATTENTION,
    "t5gemma2": CROSS_ATTENTION,
    "udop": CROSS_ATTENTION,
    "vision-encoder-decoder": CROSS_ATTENTION,
}
# Not built in these tests, and why.
NOT_BUILT = {
    "gemma3n": "its vision tower needs timm; its decoder alone is exact before the decoder",
    "inkling_mm_model": "it needs scipy",
    "pixtral": "transformers 4 lists it, and it is a vision tower without a decoder",
}

# Exact types on which more is tested.
SEVERAL_AXES = (
    "cohere_compass",
    "ernie4_5_vl_moe",
    "glm4v",
    "glm4v_moe",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_omni_moe_thinker",
    "qwen3_vl",
)
DEEPSTACK = (
    "cohere_compass",
    "cosmos3_omni",
    "granite4_vision",
    "granite_docling",
    "qwen3_omni_moe_thinker",
    "qwen3_vl",
    "qwen3_vl_moe",
)
# Their vision towers look their attention up in tables of their own, where no name can be added.
TEXT_CONFIG_ONLY = ("deepseek_ocr2", "deepseek_vl_hybrid")
STATIC_CACHE = ("cohere2_vision", "exaone4_5", "gemma3", "glm4v", "qwen2_5_vl", "qwen3_vl")
EMBEDDINGS = ("gemma3", "idefics3", "internvl", "mistral3", "molmo2", "qwen2_5_vl")
SEVERAL_TURNS = (
    "cohere2_vision",
    "gemma3",
    "glm4v",
    "internvl",
    "mistral3",
    "paligemma",
    "qwen2_5_vl",
    "qwen3_vl",
)
# Types whose tiny vision tower runs too, by the layout of their pixel values.
IMAGES = {
    "aya_vision": "images",
    "cohere2_vision": "images",
    "cohere_compass": "patches of two frames",
    "cosmos3_edge": "patches",
    "cosmos3_omni": "patches of two frames",
    "deepseek_vl": "images",
    "ernie4_5_vl_moe": "patches",
    "exaone4_5": "patches of two frames",
    "gemma3": "images",
    "glm46v": "patches of two frames",
    "glm4v": "patches of two frames",
    "glm4v_moe": "patches of two frames",
    "glm_ocr": "patches of two frames",
    "glmga": "patches of two frames",
    "got_ocr2": "images",
    "hyperclovax_vision_v2": "patches of two frames",
    "idefics3": "images by sample",
    "internvl": "images",
    "janus": "images",
    "kimi_k25": "square patches",
    "lighton_ocr": "images and sizes",
    "llava": "images",
    "mistral3": "images and sizes",
    "ovis2": "images",
    "paddleocr_vl": "square patches",
    "paligemma": "images",
    "perception_lm": "tiles",
    "pp_chart2table": "images",
    "qianfan_ocr": "images",
    "qwen2_5_omni_thinker": "patches of two frames",
    "qwen2_5_vl": "patches of two frames",
    "qwen2_vl": "patches of two frames",
    "qwen3_omni_moe_thinker": "patches of two frames",
    "qwen3_vl": "patches of two frames",
    "qwen3_vl_moe": "patches of two frames",
    "shieldgemma2": "images",
    "smolvlm": "images by sample",
    "step3p7": "images",
    "video_llama_3": "patches and merge sizes",
    "video_llava": "images",
    "vipllava": "images",
}
# The same of types that are pruned before their decoder only.
IMAGES_BEFORE = {
    "gemma4": "patches with positions",
    "lfm2_vl": "padded patches",
    "lfm3_vl": "patches of two frames",
    "glm5_next": "patches of two frames",
    "llama4": "images",
    "minimax_m3_vl": "patches of two frames",
    "mistral_large4": "images and sizes",
    "qwen3_5": "patches of two frames",
    "qwen3_5_moe": "patches of two frames",
    "qwen4_exp": "patches of two frames",
}
# Of those, the ones whose vision tower can't tell the visual tokens apart, with a part of the sentence that says why.
TOWERS_REFUSED = {
    "got_ocr2": "found no encoder",
    "perception_lm": "made 105 features of 108 rows",
    "pp_chart2table": "found no encoder",
    "step3p7": "patches that belong to others too",
    "video_llama_3": "sizes that differ from image to image",
    "video_llava": "it has several",
}
# Releases before these call the vision tower in other ways.
IMAGES_SINCE = (
    {"got_ocr2": "5", "ovis2": "5", "video_llava": "5.23"}
    | dict.fromkeys(IMAGES_BEFORE, "5")
    | {"llama4": "5.24"}
)
