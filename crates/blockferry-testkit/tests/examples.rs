//! The example is run, not only compiled.

#[path = "../examples/own_device.rs"]
mod own_device;

#[test]
fn an_embedder_finds_the_mistake_in_a_device_of_its_own() {
    own_device::main().expect("the example ends well");
}
