"""All of this book that needs a GPU, in one command: what runs (`parts`), how (`runner`), with what (`packs`)."""
