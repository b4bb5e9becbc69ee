//! Block sources and targets of blockferry: traits, files, block devices, decorators
