"""A small vision transformer, which params.yaml names as `module:own.vit:ViT`."""

from torch import Tensor, nn
from torchvision.models import VisionTransformer


class ViT(nn.Module):
    """Images [B, 3, S, S] to num_classes numbers per image, [B, num_classes].

    Patches of 8 x 8 pixels, 4 encoder layers of 128 features and 4 heads, 0.8 million parameters: torchvision's architecture
    (Dosovitskiy et al., ICLR 2021) at a size that 1,437 digits can train.
    """

    def __init__(self, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.network = VisionTransformer(image_size, 8, num_layers=4, num_heads=4, hidden_dim=128, mlp_dim=512, num_classes=1)
        self.network.heads = nn.Linear(128, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)
