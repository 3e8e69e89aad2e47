"""`python -m jaxserve.native` builds the library ahead of its first use."""

from jaxserve.native.build import BuildError, library


def main() -> None:
    """Prints where the library lies, or why there is none."""
    try:
        print(library(print))
    except BuildError as error:
        print(f"the CPU kernels are not there, and XLA will serve without them, slower by far: {error}")


if __name__ == "__main__":
    main()
