//! State slots and decisions alone: whatever they say, opening keeps the target, and what it settles on stays.
#![no_main]

use blockferry_fuzz::machine::{Choice, Machine};
use blockferry_fuzz::pages::{Files, PAGE, SLOT_PAGES, STATE, Sizes, unpack};
use blockferry_fuzz::text;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let Some((first, pieces)) = input.split_first() else {
        return;
    };
    // Every piece belongs to the state.
    let pieces = of_the_state(pieces);
    let machine = Machine::new(Choice(*first), &pieces, Sizes::Any);
    drop(machine.look());
    the_newer_slot_counts(Choice(*first), unpack(&pieces, Sizes::Any));
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
    drop(text::of_result(&moved_on));
    if moved_on.is_ok() {
        drop(replica);
        let again = machine
            .open()
            .expect("what was recovered, or succeeded, can be opened");
        if Choice(*first).next(4) == 3 {
            let settled = (point.as_ref(), retained.as_ref());
            assert_eq!((again.point(), again.retained()), settled);
        }
    }
    assert!(machine.content() == before, "there are no pre-images");
});

/// Of two slots that can each stand alone, the one with the higher sequence says where the target is.
fn the_newer_slot_counts(choice: Choice, files: Files) {
    let Some(state) = &files[STATE] else { return };
    let sequences = SLOT_PAGES.map(|page| sequence_of(&state[page * PAGE..]));
    let seen_with = |blanked: Option<usize>| {
        let mut files = files.clone();
        if let (Some(page), Some(state)) = (blanked, &mut files[STATE]) {
            state[page * PAGE..(page + 1) * PAGE].fill(0);
        }
        let looked = Machine::with_files(choice, &files).look().ok().flatten()?;
        Some((looked.point, looked.retained, looked.recorded_evidence))
    };
    let [first, second] = [SLOT_PAGES[1], SLOT_PAGES[0]].map(|other| seen_with(Some(other)));
    let newer = match (&first, &second) {
        (Some(_), Some(_)) if sequences[0] > sequences[1] => first,
        (Some(_), Some(_)) if sequences[0] < sequences[1] => second,
        _ => return,
    };
    assert!(seen_with(None) == newer, "an older slot counts");
}

fn sequence_of(slot: &[u8]) -> u64 {
    u64::from_le_bytes(*slot[12..].first_chunk().expect("a page is longer"))
}

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
