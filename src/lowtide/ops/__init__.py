"""Operations on plain tensors: no modules, no weights' whereabouts."""
