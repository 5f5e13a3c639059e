"""One small member of each of timm's families, at the smallest images it takes."""

from __future__ import annotations

from small_models import ATTENTION, Small

_VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2}
_RESNET = {"layers": [1, 1, 2, 1], "channels": [8, 16, 24, 32]}
_SWIN = {
    "img_size": 16,
    "patch_size": 2,
    "window_size": 2,
    "embed_dim": 16,
    "depths": [1, 1, 2, 1],
    "num_heads": [1, 1, 1, 1],
}
_PYRAMID = {"depths": [1, 1, 2, 1], "embed_dims": [8, 16, 40, 32]}
_SEQUENCER = {"layers": [1] * 4, "embed_dims": [16] * 4, "hidden_sizes": [8] * 4}

PAPER = [
    Small("mobilenetv1_100", {}, size=32),
    Small("resnet50", _RESNET, size=32),
    Small("resnet101", {**_RESNET, "layers": [2, 2, 4, 2]}, size=32),
    Small("densenet121", {"growth_rate": 4, "block_config": [2, 2, 3, 2]}, size=32),
    Small("legacy_xception", {}, size=32),
    Small("vit_tiny_patch16_224", {**_VIT, "embed_dim": 64, "depth": 12, "num_heads": 8}),
]
"""DeAlcala et al., ICCV 2025."""

FAMILIES = [
    Small("deit_tiny_patch16_224", _VIT),
    Small("deit_tiny_distilled_patch16_224", _VIT),
    Small("vit_small_patch14_reg4_dinov2", _VIT),
    Small("eva02_tiny_patch14_224", _VIT),
    Small("beit_base_patch16_224", _VIT),
    Small("cait_xxs24_224", _VIT),
    Small("xcit_nano_12_p8_224", {**_VIT, "patch_size": 8}),
    Small(
        "tnt_s_legacy_patch16_224",
        {
            "img_size": 32,
            "embed_dim": 32,
            "inner_dim": 8,
            "depth": 4,
            "num_heads_outer": 2,
            "num_heads_inner": 2,
        },
        size=32,
    ),
    Small("pit_ti_distilled_224", {"img_size": 32, "base_dims": [8, 8, 8]}, size=32),
    Small("mixer_s32_224", {"img_size": 64, "mlp_ratio": [0.5, 1.0]}, size=64),
    Small("swin_tiny_patch4_window7_224", _SWIN),
    Small("swinv2_tiny_window8_256", _SWIN),
    Small("twins_pcpvt_small", {**_PYRAMID, "img_size": 32}, size=32),
    Small("pvt_v2_b0", _PYRAMID, size=32),
    Small(
        "hiera_tiny_224", {"img_size": [32, 32], "embed_dim": 8, "stages": [1, 1, 2, 1]}, size=32
    ),
    Small("levit_128s", {"img_size": 64}, size=64),
    Small("mvitv2_tiny", {"img_size": 32}, size=32),
    Small("nest_tiny", {"img_size": 32, "mlp_ratio": 1.0}, size=32),
    Small("volo_d1_224", {"img_size": 32, "mlp_ratio": 1.0}, size=32),
    Small("focalnet_tiny_srf", {"mlp_ratio": 1.0}, size=32),
    Small("coatnet_pico_rw_224", {"img_size": 32}, size=32),
    Small("mobilevit_xxs", {}, size=32),
    Small("poolformer_s12", {}, size=32),
    Small("sequencer2d_s", _SEQUENCER, size=32),
    Small("convnext_atto", {"depths": [1, 1, 2, 1], "dims": [8, 16, 24, 32]}, size=32),
    Small("tf_efficientnetv2_b0", {"channel_multiplier": 0.25, "depth_multiplier": 0.5}, size=32),
    Small("mobilenetv3_small_050", {}, size=32),
    Small("mobilenetv4_conv_small_035", {}, size=32),
    Small("ghostnet_050", {}, size=32),
    Small("regnety_002", {"w0": 8, "wa": 8.0, "wm": 2.0, "depth": 6, "group_size": 8}, size=32),
    Small("res2net50_26w_4s", _RESNET, size=32),
    Small("dla46_c", {}, size=32),
    Small("dpn48b", {}, size=32),
    Small("hrnet_w18_small", {}, size=32),
    Small("repvgg_a0", {}, size=32),
    Small("test_nfnet", {}, size=32),
    Small("vgg11", {"mlp_ratio": 0.02}, size=32),
    Small("inception_v3", {}, size=75),
]
ALL = PAPER + FAMILIES
assert all(small.head is ATTENTION for small in ALL)  # which reads whatever any of them gives
