"""What downres knows of timm, torchvision and a user's own file: the only code that names them."""

from .load import Model, load_model, with_preprocessing

__all__ = ["Model", "load_model", "with_preprocessing"]
