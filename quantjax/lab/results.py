def show(w):
    pass
