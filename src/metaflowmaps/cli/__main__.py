"""python -m metaflowmaps.cli"""

from metaflowmaps.cli import main

main()
