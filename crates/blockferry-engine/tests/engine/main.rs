//! The engine as an embedder uses it, on a simulated machine and on real directories.

mod change_maps;
mod equal;
mod harness;
mod interrupted;
mod known;
