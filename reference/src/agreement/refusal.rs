//! One rank's refusal, told to all.
//!
//! For calls whose arguments need not be known to all ranks: each rank judges
//! its own, and who refuses says so in words of its own. [`reach`](super::reach)
//! is for those that only all ranks together can judge.

use crate::{
    communicator::{Communicator, CommunicatorError},
    error::{Error, Refusal, Result},
};

/// Every rank's facts, in rank order, or the refusal of the first rank that
/// refuses; the same on all ranks. Every rank has equally many facts.
///
/// `arguments` are all that may be refused, in an order that is the same on
/// every rank. An error that is no refusal of one of these stays on its rank,
/// which then abandons the communicator.
pub(crate) fn gather(
    communicator: &dyn Communicator,
    own: Result<Vec<i64>>,
    facts: usize,
    arguments: &[&'static str],
) -> Result<Vec<Vec<i64>>> {
    let (own, refused) = match own {
        Ok(own) => (own, None),
        Err(error) => match place(&error, arguments) {
            Some(refused) => (vec![0; facts], Some(refused)),
            None => {
                communicator.abandon(&error.to_string());
                return Err(error);
            }
        },
    };
    // Where the argument stands, counted from 1, and how long the texts are.
    let header = match &refused {
        None => [0; 3],
        Some((place, refusal)) => [
            *place as i64 + 1,
            refusal.problem.len() as i64,
            refusal.remedy.len() as i64,
        ],
    };
    let gathered = communicator.all_gather(&[&header, &own[..]].concat())?;
    let headers = gathered.iter().map(|words| match words[..] {
        [argument, problem, remedy, ..] if argument > 0 => Some([argument, problem, remedy]),
        _ => None,
    });
    let headers: Vec<Option<[i64; 3]>> = headers.collect();
    let lengths = headers
        .iter()
        .flatten()
        .map(|[_, problem, remedy]| problem + remedy);
    let Some(longest) = lengths.max() else {
        return Ok(gathered
            .into_iter()
            .map(|words| words[3..].to_vec())
            .collect());
    };
    // A byte is a word: refusals are short, and seldom.
    let text = refused.map(|(_, refusal)| refusal.problem + &refusal.remedy);
    let mut words: Vec<i64> = text.unwrap_or_default().bytes().map(i64::from).collect();
    words.resize(longest as usize, 0);
    let texts = communicator.all_gather(&words)?;
    let refusals = headers.iter().zip(&texts).enumerate();
    let told = refusals.filter_map(|(rank, (header, text))| {
        let [argument, problem, remedy] = (*header)?.map(|word| word as usize);
        let text = |range: std::ops::Range<usize>| {
            let bytes: Vec<u8> = text.get(range)?.iter().map(|&word| word as u8).collect();
            String::from_utf8(bytes).ok()
        };
        Some(Refusal {
            rank: Some(rank),
            argument: arguments.get(argument - 1)?,
            problem: text(0..problem)?,
            remedy: text(problem..problem + remedy)?,
        })
    });
    let mut told = told;
    Err(match told.next() {
        Some(refusal) => Error::from(refusal),
        None => Error::from(CommunicatorError::Mismatch {
            operation: "all_gather",
            rank: headers.iter().position(Option::is_some).unwrap_or_default(),
            problem: "told of a refusal that makes no sense".to_owned(),
        }),
    })
}

/// The refusal, and which of the arguments it is of.
fn place(error: &Error, arguments: &[&'static str]) -> Option<(usize, Refusal)> {
    let Error::Refused(refusal) = error else {
        return None;
    };
    let place = arguments
        .iter()
        .position(|&known| known == refusal.argument)?;
    Some((place, refusal.clone()))
}
