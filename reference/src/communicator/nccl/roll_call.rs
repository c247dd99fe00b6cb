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
fn misfit(own: usize, operation: &'static str, accounts: &[Account]) -> Option<CommunicatorError> {
    let mismatch = |rank, problem| CommunicatorError::Mismatch {
        operation,
        rank,
        problem,
    };
    let (mine, ranks) = (accounts.get(own)?, accounts.iter().enumerate());
    let place = |account: &Account| (account.number, account.operation.clone());
    let elsewhere = ranks.clone().find(|(_, other)| place(other) != place(mine));
    if let Some((
        rank,
        Account {
            number, operation, ..
        },
    )) = elsewhere
    {
        let problem = format!(
            "is in its collective #{number} ({operation}), and rank {own} in #{} ({})",
            mine.number, mine.operation
        );
        return Some(mismatch(rank, problem));
    }
    let pairs = ranks.flat_map(|(receiver, account)| {
        let due = account.due.iter().enumerate();
        due.map(move |(sender, due)| (receiver, sender, *due))
    });
    let mut unequal = pairs.filter_map(|(receiver, sender, due)| {
        let sent = *accounts.get(sender)?.sent.get(receiver)?;
        (sent != due).then_some((receiver, sender, sent, due))
    });
    let first = unequal.clone().find(|&(receiver, ..)| receiver == own);
    let (receiver, sender, sent, due) = first.or_else(|| unequal.next())?;
    let problem = format!("sent rank {receiver} {sent} bytes where {due} were due");
    Some(mismatch(sender, problem))
}
