"""What every model of this package does when it is loaded."""


class LoadedAsBuiltMixin:
    """Parameters that a model is built with frozen are frozen after `from_pretrained` too.

    transformers puts a new, trainable parameter in the place of each that it loads, so that a position table or a mask
    token outside the graph would be trained, or stop distributed training for want of a gradient.
    """

    def post_init(self):
        super().post_init()
        self._frozen_as_built = {name for name, weight in self.named_parameters() if not weight.requires_grad}

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As transformers'; see the class."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = (
            loaded[0] if isinstance(loaded, tuple) else loaded
        )  # with `output_loading_info=True` a report comes along
        for name, weight in model.named_parameters():
            if name in model._frozen_as_built:
                weight.requires_grad_(False)
        return loaded
