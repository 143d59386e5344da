"""Operations on plain tensors, which know nothing of modules or of where weights rest."""
