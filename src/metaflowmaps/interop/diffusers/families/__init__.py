"""One file a kind of pipeline; :func:`metaflowmaps.interop.diffusers.family_of` finds them."""
