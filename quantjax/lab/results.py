def show(w): pass
