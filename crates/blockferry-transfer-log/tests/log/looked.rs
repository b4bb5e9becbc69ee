//! Whether looking at a replica, as `status` does, tells the truth.

use blockferry_transfer_log::{DecisionKind, Inspection, Recovered, Replica};

use crate::model::check;

/// What was seen without a lock and without recovering agrees with what opening then found and did.
pub(crate) fn check_looked(looked: Option<&Inspection>, replica: &Replica) -> Result<(), String> {
    let recovered = replica.recovered();
    let Some(looked) = looked else {
        check!(
            *recovered == Recovered::Clean && replica.point().is_none(),
            "no state was seen, but opening recovered {recovered:?}"
        );
        return Ok(());
    };
    let unfinished = looked.unfinished.as_ref();
    let seen = unfinished.map(|u| (u.header.session, u.decision));
    let expected = match (seen, recovered) {
        (None, Recovered::Clean) => true,
        // Only the decision that says so had to be written again.
        (None, Recovered::Applied(done)) => looked.point.as_ref().is_some_and(|p| p.id == *done),
        (Some((session, None | Some(DecisionKind::GiveUp))), Recovered::Staging) => {
            replica.unfinished().map(|h| h.session) == Some(session)
        }
        // Of a prepared member its group decides, which looking does not ask.
        (Some((_, Some(DecisionKind::Prepared))), Recovered::Clean) => true,
        (Some((session, Some(DecisionKind::Prepared))), Recovered::GroupPending(done)) => {
            session == *done
        }
        (Some((session, Some(decision))), Recovered::Applied(done)) => {
            let carried_out = [
                DecisionKind::Prepared,
                DecisionKind::Commit,
                DecisionKind::Applied,
            ];
            session == *done && carried_out.contains(&decision)
        }
        (Some((session, Some(decision))), Recovered::RolledBack(done)) => {
            let carried_out = [DecisionKind::Rollback, DecisionKind::RolledBack];
            session == *done && carried_out.contains(&decision)
        }
        _ => false,
    };
    check!(
        expected,
        "looking saw {seen:?}, but opening recovered {recovered:?}"
    );
    let settled = matches!(recovered, Recovered::Clean | Recovered::Staging);
    check!(
        !settled || looked.point.as_ref() == replica.point(),
        "looking saw the point {:?}, opening found {:?}",
        looked.point,
        replica.point()
    );
    check!(
        !settled || looked.retained.as_ref() == replica.retained(),
        "looking saw {:?} kept, opening found {:?}",
        looked.retained,
        replica.retained()
    );
    Ok(())
}
