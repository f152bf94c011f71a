"""Integer codes of few bits: ``codes`` packs them (four bits are packed there), ``rounding`` finds codes and scales."""
