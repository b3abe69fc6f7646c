"""Lightning data modules: scikit-learn's digits, and folders of images."""

from picnn_fast.data.digits import DigitsDataModule
from picnn_fast.data.image_folder import ImageFolderDataModule

__all__ = ["DigitsDataModule", "ImageFolderDataModule"]
