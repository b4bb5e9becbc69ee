//! Full download: copy everything that is not zero, without comparison
