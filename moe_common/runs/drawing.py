"""matplotlib's pyplot, drawing into files; matplotlib comes with the extra `demo`."""


def load_pyplot():
    """pyplot without a window. To be called before a long work that ends with a picture, so that it fails at once.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError("Drawing needs matplotlib. Install it with: pip install '.[demo]'") from missing
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
