"""The playground: a page on this machine on which a map is drawn from and steered."""
