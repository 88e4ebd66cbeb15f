NAME="demo"; HELP="x"; EXAMPLE="x"
def add_arguments(parser): pass
def run(a): return True
