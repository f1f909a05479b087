"""A batch cut into pieces, and the gradients of all of them: every objective must not care how it was cut."""


def cut(images, batch, rows):
    return images[rows], {name: value[rows] for name, value in batch.items()}


def gradients(module, *pieces):
    module.zero_grad()
    total = sum(module(*piece)[0] for piece in pieces)
    total.backward()
    return total.detach(), {name: p.grad.clone() for name, p in module.named_parameters()}
