"""Registry of explanation methods: name -> "module:object".

To add a method, write a function decorated with `grounding.methods.base.method` and add a line to METHODS; another
distribution adds an entry point of the group `grounding.methods`.
"""

from grounding.core.registry import Registry

METHODS = Registry(
    "method",
    {
        "gradcam": "grounding.methods.cam:gradcam",
        "gradcam_ln": "grounding.methods.cam:gradcam_ln",
        "hirescam": "grounding.methods.cam:hirescam",
        "layercam": "grounding.methods.cam:layercam",
        "gradcam_pp": "grounding.methods.cam:gradcam_pp",
        "rollout": "grounding.methods.attention:rollout",
        "relevance": "grounding.methods.relevance:relevance",
        "gradient_rollout": "grounding.methods.attention:gradient_rollout",
        "attention": "grounding.methods.attention:raw_attention",
        "grad_x_attention": "grounding.methods.cross_attention:grad_x_attention",
        "attention_gradcam": "grounding.methods.cross_attention:attention_gradcam",
        "cross_attention": "grounding.methods.cross_attention:cross_attention",
        "gradient_x_cross_attention": "grounding.methods.cross_attention:gradient_x_cross_attention",
        "legrad": "grounding.methods.legrad:legrad",
        "grad_eclip": "grounding.methods.grad_eclip:grad_eclip",
        "occlusion": "grounding.methods.perturbation:occlusion",
        "rise": "grounding.methods.perturbation:rise",
    },
    group="grounding.methods",
    aliases={"gae": "relevance"},
)
