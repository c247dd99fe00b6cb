//! What a rank brings to a round of the data loader, told to all ranks before
//! any tensor moves: a batch, nothing any more, or what went wrong.
//!
//! It travels as JSON in the words of two gathers, for texts and shapes have no
//! fixed length.

use super::{ARGUMENTS, Batch, refuse_entry, shard::Shard};
use crate::{
    communicator::{Communicator, CommunicatorError},
    error::{Error, Refusal, Result},
    token_partition::{Sharding, TokenPartition},
};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

/// The dtypes that entries have.
const DTYPES: [(Kind, &str); 10] = [
    (Kind::Double, "float64"),
    (Kind::Float, "float32"),
    (Kind::BFloat16, "bfloat16"),
    (Kind::Half, "float16"),
    (Kind::Int64, "int64"),
    (Kind::Int, "int32"),
    (Kind::Int16, "int16"),
    (Kind::Int8, "int8"),
    (Kind::Uint8, "uint8"),
    (Kind::Bool, "bool"),
];

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Message {
    pub(super) step: Step,
    pub(super) offer: Offer,
}

/// Where a rank is; all are to be at the same.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Step {
    pub(super) epoch: usize,
    pub(super) round: usize,
    /// Whether it asks how many batches are left, instead of for the next.
    pub(super) counting: bool,
    pub(super) sharding: String,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Offer {
    Batch(Outline),
    Nothing,
    Failed(Complaint),
    Left(usize),
}

/// A refusal but for whose it is, which the receiver knows.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Complaint {
    argument: String,
    problem: String,
    remedy: String,
}

/// A batch without its data.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Outline {
    tokens: usize,
    /// In the order of their names.
    entries: Vec<EntryOutline>,
    document_ends: Option<Vec<Vec<usize>>>,
}

#[derive(Debug, Serialize, Deserialize)]
struct EntryOutline {
    name: String,
    dtype: String,
    size: Vec<i64>,
    /// The dimension of the tokens.
    tokens: Option<usize>,
}

/// Every rank's offer, in rank order.
///
/// # Errors
/// Those of the communicator, and the same error on every rank when the ranks
/// are not at the same step.
pub(super) fn gather(communicator: &dyn Communicator, own: &Message) -> Result<Vec<Offer>> {
    let operation = "the data loader's gather";
    let text = serde_json::to_vec(own).map_err(|error| CommunicatorError::Unusable {
        operation,
        reason: error.to_string(),
    })?;
    let lengths = communicator.all_gather(&[text.len() as i64])?.concat();
    let longest = lengths.iter().copied().max().unwrap_or(0) as usize;
    let mut words = vec![0; longest.div_ceil(8)];
    for (word, bytes) in words.iter_mut().zip(text.chunks(8)) {
        let mut whole = [0; 8];
        whole[..bytes.len()].copy_from_slice(bytes);
        *word = i64::from_le_bytes(whole);
    }
    let gathered = communicator.all_gather(&words)?;
    let mismatch = |rank, problem| CommunicatorError::Mismatch {
        operation,
        rank,
        problem,
    };
    let messages = gathered
        .iter()
        .zip(lengths)
        .enumerate()
        .map(|(rank, (words, length))| {
            let mut text: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            text.truncate(length as usize);
            serde_json::from_slice::<Message>(&text)
                .map_err(|error| mismatch(rank, format!("gave what is no offer ({error})")))
        })
        .collect::<Result<Vec<_>, _>>()?;
    for (rank, message) in messages.iter().enumerate() {
        let (step, first) = (&message.step, &messages[0].step);
        if step.sharding != first.sharding {
            return Err(Error::from(Refusal {
                rank: Some(rank),
                argument: "sharding",
                problem: format!("is {}, but {} on rank 0", step.sharding, first.sharding),
                remedy: "give all ranks the same".to_owned(),
            }));
        }
        if step != first {
            let problem = format!("{step} while rank 0 {first}");
            return Err(Error::from(mismatch(rank, problem)));
        }
    }
    Ok(messages.into_iter().map(|message| message.offer).collect())
}

impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let asks = match self.counting {
            true => "counts what is left at",
            false => "is at",
        };
        write!(f, "{asks} round {} of epoch {}", self.round, self.epoch)
    }
}

impl Complaint {
    /// That a rank's stream gave an error in place of a batch.
    pub(super) fn of_stream(error: impl std::fmt::Display) -> Self {
        Self {
            argument: "batches".to_owned(),
            problem: format!("gave an error: {error}"),
            remedy: "mend the source of this rank's batches, and begin an epoch anew".to_owned(),
        }
    }

    /// That a batch could not be prepared.
    pub(super) fn of(error: Error) -> Self {
        match error {
            Error::Refused(refusal) => Self {
                argument: refusal.argument.to_owned(),
                problem: refusal.problem,
                remedy: refusal.remedy,
            },
            other => Self::of_stream(other),
        }
    }

    pub(super) fn into_error(self, rank: usize) -> Error {
        let known = ARGUMENTS.into_iter().find(|&name| name == self.argument);
        Error::from(Refusal {
            rank: Some(rank),
            argument: known.unwrap_or("batch"),
            problem: self.problem,
            remedy: self.remedy,
        })
    }
}

impl Outline {
    /// Refused when an entry has a dtype that does not travel.
    pub(super) fn of(batch: &Batch) -> Result<Self> {
        let (_, tokens) = batch.extent()?;
        let entries = batch.entries.iter().map(|(name, entry)| {
            let kind = entry.tensor.f_kind()?;
            match DTYPES.into_iter().find(|&(known, _)| known == kind) {
                Some((_, dtype)) => Ok(EntryOutline {
                    name: name.clone(),
                    dtype: dtype.to_owned(),
                    size: entry.tensor.size(),
                    tokens: entry.tokens,
                }),
                None => {
                    let remedy = format!("give one of {}", DTYPES.map(|(_, name)| name).join(", "));
                    refuse_entry(name, format!("is {kind:?}"), remedy)
                }
            }
        });
        Ok(Self {
            tokens,
            entries: entries.collect::<Result<_>>()?,
            document_ends: batch.document_ends.clone(),
        })
    }

    /// Room for the shard of `rank`, on the host.
    pub(super) fn room(self, sharding: Sharding, rank: usize, ranks: usize) -> Result<Shard> {
        let tokens = TokenPartition::even(sharding, self.tokens, ranks)?;
        let entries = self.entries.into_iter().map(|mut entry| {
            let held = entry.tokens.and_then(|at| entry.size.get_mut(at));
            if let Some(held) = held {
                *held = tokens.tokens(rank) as i64;
            }
            let known = DTYPES.into_iter().find(|&(_, name)| name == entry.dtype);
            let Some((kind, _)) = known else {
                return refuse_entry(
                    &entry.name,
                    format!("is {}", entry.dtype),
                    "give all ranks the same release of this library",
                );
            };
            let room = Tensor::f_empty(entry.size, (kind, Device::Cpu))?;
            Ok((entry.name, room))
        });
        Ok(Shard {
            entries: entries.collect::<Result<_>>()?,
            document_ends: self.document_ends,
            tokens,
        })
    }
}
