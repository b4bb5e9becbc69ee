//! Opening a replica whose state and log hold anything: never a panic, nothing moves without a decision, and opening
//! twice is opening once.
#![no_main]

use blockferry::transfer_log::{Prepared, Replica, Result};
use blockferry_fuzz::machine::{Choice, Machine};
use blockferry_fuzz::pages::Sizes;
use blockferry_fuzz::text;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let Some((first, pieces)) = input.split_first() else {
        return;
    };
    let choice = Choice(*first);
    drop(Machine::new(choice, pieces, Sizes::Any).look());

    let machine = Machine::new(choice, pieces, Sizes::Bounded);
    drop(machine.look());
    let before = machine.content();
    let opened = machine.open();
    let moved = machine.content() != before;
    assert!(machine.may_move() || !moved, "moved without a decision");
    let Ok(replica) = opened else { return };
    let point = replica.point().cloned();
    drop(replica);

    let after = machine.content();
    let mut again = machine.open().expect("it was recovered");
    assert!(machine.content() == after, "recovery is not idempotent");
    assert_eq!(again.point(), point.as_ref());

    let went_on = go_on(&mut again, choice);
    let settled = (again.point().cloned(), again.retained().cloned());
    drop((text::of_result(&went_on), again));
    if went_on.is_ok() {
        let last = machine.open().expect("what succeeded can be opened");
        let found = (last.point().cloned(), last.retained().cloned());
        assert_eq!(found, settled, "what succeeded stays");
    }
});

/// What a user does next. It may fail, but not otherwise than by an error.
fn go_on(replica: &mut Replica, choice: Choice) -> Result<()> {
    match choice.next(6) {
        0 => replica.rollback(&|_, _| {}).map(drop),
        1 => replica.accept().map(drop),
        2 => replica.cancel().map(drop),
        3 => resume_and_commit(replica),
        4 => replica.held_bytes().map(drop),
        _ => replica.can_resume().map(drop),
    }
}

fn resume_and_commit(replica: &mut Replica) -> Result<()> {
    let mut session = replica.resume(u64::MAX)?;
    let root = blockferry::core::Root::from_bytes([7; 32]);
    for _ in 0..8 {
        if !matches!(session.prepare()?, Prepared::Missing(_)) {
            return session.commit(root, &|_, _| {}).map(drop);
        }
    }
    Ok(())
}
