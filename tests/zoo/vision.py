"""Networks of Equimo, for images."""

import jax.random as jr

from .made import Made, package


def vit() -> Made:
    vit = package("equimo.vision.models.vit").VisionTransformer
    model = vit(16, 3, 24, 8, num_heads=3, depths=[2], num_classes=5, key=jr.key(0))
    return Made(model, (jr.normal(jr.key(1), (3, 16, 16)),), _image)


def convnext() -> Made:
    net = package("equimo.vision.models.convnext").ConvNeXt
    model = net(
        3, depths=[1, 1, 1, 1], dims=[8, 12, 16, 20], num_classes=5, key=jr.key(0)
    )
    return Made(model, (jr.normal(jr.key(1), (3, 32, 32)),), _image)


def _image(model, x):
    return model(x, key=jr.key(2), inference=True)


def deep_equilibrium() -> Made:
    package("banax")
    net = package("equimo.vision.models.deq").deq_convnext_t
    model = net(
        depths=[1, 1, 2, 1],
        dims=[8, 8, 8, 8],
        num_classes=5,
        fpi_tol=1e-6,
        fpi_maxsteps=60,
        key=jr.key(0),
    )
    return Made(
        model, (jr.normal(jr.key(1), (3, 32, 32)),), lambda m, x: _image(m, x)[0]
    )
