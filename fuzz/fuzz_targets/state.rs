//! State slots and decisions alone: whatever they say, opening keeps the target, and what it settles on stays.
#![no_main]

use blockferry_fuzz::machine::{Choice, Machine};
use blockferry_fuzz::pages::Sizes;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let Some((first, pieces)) = input.split_first() else {
        return;
    };
    // Every piece belongs to the state.
    let pieces = of_the_state(pieces);
    let machine = Machine::new(Choice(*first), &pieces, Sizes::Any);
    machine.look();
    let before = machine.content();

    let opened = machine.open();

    assert!(
        machine.content() == before,
        "there is no log that it could be moved by"
    );
    let Ok(mut replica) = opened else { return };
    let (point, retained) = (replica.point().cloned(), replica.retained().cloned());
    let moved_on = match Choice(*first).next(4) {
        0 => replica.accept().map(drop),
        1 => replica.cancel().map(drop),
        2 => replica.rollback(&|_, _| {}).map(drop),
        _ => Ok(()),
    };
    if moved_on.is_ok() && Choice(*first).next(4) == 3 {
        drop(replica);
        let again = machine.open().expect("it was recovered");
        assert_eq!(
            (again.point(), again.retained()),
            (point.as_ref(), retained.as_ref())
        );
    }
    assert!(machine.content() == before, "there are no pre-images");
});

fn of_the_state(pieces: &[u8]) -> Vec<u8> {
    let mut all = pieces.to_vec();
    let mut at = 0;
    while let Some(head) = all.get(at..at + 4) {
        let length = usize::from(u16::from_le_bytes([head[2], head[3]]));
        all[at] &= !3;
        at += 4 + length;
    }
    all
}
