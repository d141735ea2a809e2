"""Decoders: types behind one contract."""
