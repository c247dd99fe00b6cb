//! What ranks tell each other when a collective was given up.
//!
//! A rank that waits for NCCL does not know for whom, nor whether that one will
//! ever come. Each that has given up says so, and who says nothing within the
//! same time again is missing. Where all come, they look for what does not fit.

use super::Rendezvous;
use crate::communicator::CommunicatorError;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// What one rank was in when it gave up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Account {
    /// Collectives of this communicator that were begun, this one too.
    pub(super) number: u64,
    pub(super) operation: String,
    /// Bytes for each rank.
    pub(super) sent: Vec<usize>,
    /// Bytes that each rank should have sent here.
    pub(super) due: Vec<usize>,
}

/// The error that becomes of a collective that was not done within `limit`.
pub(super) fn roll_call(
    rendezvous: &dyn Rendezvous,
    operation: &'static str,
    own: &Account,
    limit: Duration,
) -> CommunicatorError {
    let unknown = || CommunicatorError::TimedOut {
        operation,
        missing: Vec::new(),
        limit,
    };
    let Ok(told) = serde_json::to_vec(own) else {
        return unknown();
    };
    let accounts = match rendezvous.gather("the roll call", &told, limit) {
        Ok(accounts) => accounts,
        Err(CommunicatorError::TimedOut { missing, .. }) => {
            return CommunicatorError::TimedOut {
                operation,
                missing,
                limit,
            };
        }
        Err(error) => return error.in_operation(operation),
    };
    let accounts = accounts
        .iter()
        .map(|account| serde_json::from_slice(account));
    match accounts.collect::<Result<Vec<Account>, _>>() {
        Ok(accounts) => misfit(rendezvous.rank(), operation, &accounts).unwrap_or_else(unknown),
        Err(_) => unknown(),
    }
}

/// What does not fit in what all ranks tell, what concerns rank `own` first.
///
/// It is in the earliest collective that anybody is in: who is in a later one
/// was done with it and waits for the others.
fn misfit(own: usize, operation: &'static str, accounts: &[Account]) -> Option<CommunicatorError> {
    let mismatch = |rank, problem| CommunicatorError::Mismatch {
        operation,
        rank,
        problem,
    };
    let (mine, ranks) = (accounts.get(own)?, accounts.iter().enumerate());
    let earliest = accounts.iter().map(|account| account.number).min()?;
    let is_there = move |account: &Account| account.number == earliest;
    let mut there = ranks.clone().filter(|&(_, account)| is_there(account));
    let pairs = ranks.flat_map(|(receiver, account)| {
        let due = account.due.iter().enumerate();
        due.map(move |(sender, due)| (receiver, account, sender, *due))
    });
    let mut unequal = pairs.filter_map(|(receiver, account, sender, due)| {
        let other = accounts.get(sender)?;
        let sent = *other.sent.get(receiver)?;
        let compared = is_there(account) && is_there(other) && account.operation == other.operation;
        (compared && sent != due).then_some((receiver, sender, sent, due))
    });
    let first = unequal.clone().find(|&(receiver, ..)| receiver == own);
    if let Some((receiver, sender, sent, due)) = first.or_else(|| unequal.next()) {
        let problem = format!("sent rank {receiver} {sent} bytes where {due} were due");
        return Some(mismatch(sender, problem));
    }
    let place = |account: &Account| (account.number, account.operation.clone());
    let (rank, other) = there.find(|&(_, other)| place(other) != place(mine))?;
    let problem = format!(
        "is in its collective #{} ({}), and rank {own} in #{} ({})",
        other.number, other.operation, mine.number, mine.operation
    );
    Some(mismatch(rank, problem))
}
