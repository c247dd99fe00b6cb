//! Sums and gathers of tensors, made of the exchange of blocks.
//!
//! Sums are in rank order, whoever adds: what two ranks hold of one sum has the
//! same bits, and so has the next run. Half types are added in float32 and
//! rounded once.
//!
//! Every function begins with one gather of words, so that tensors that do not
//! fit one another are the same refusal on every rank, before any data moves.
//!
//! Not here: anything differentiable. What comes back has no graph.

use super::Communicator;
use crate::error::{Refusal, Result};
use tch::{Kind, Tensor};

/// Sizes beyond these are refused, so that a description has one length.
const DIMENSIONS: usize = 8;

const KINDS: [(Kind, &str); 8] = [
    (Kind::Double, "float64"),
    (Kind::Float, "float32"),
    (Kind::BFloat16, "bfloat16"),
    (Kind::Half, "float16"),
    (Kind::Int64, "int64"),
    (Kind::Int, "int32"),
    (Kind::Int16, "int16"),
    (Kind::Uint8, "uint8"),
];

/// The sum of every rank's `tensor`, the same bits on every rank.
///
/// Any shape of at most 8 dimensions and any strides; the sum is contiguous
/// and has the dtype of `tensor`. Each rank adds a part: twice (P - 1)/P of the
/// tensor leaves a rank, in two exchanges.
///
/// # Errors
/// The same refusal on every rank when shapes or dtypes differ between ranks,
/// or the dtype has no sum; those of the communicator.
pub fn all_reduce(communicator: &dyn Communicator, tensor: &Tensor) -> Result<Tensor> {
    let described = Described::new("tensor", tensor, &[]);
    described.agree(communicator, |_, _| None)?;
    let _guard = tch::no_grad_guard();
    let flat = tensor.f_detach()?.f_reshape([-1])?;
    let counts = near_even(tensor.numel() as i64, communicator.size());
    let part = sum_parts(communicator, &flat, &counts)?;
    let whole = join_parts(communicator, &part, &counts)?;
    Ok(whole.f_view(tensor.size().as_slice())?)
}

/// This rank's part of the sum of every rank's `flat`: rank r gets the
/// `counts[r]` elements that follow those of rank r - 1.
///
/// `flat` has one dimension, of any stride; parts may be empty.
///
/// # Errors
/// The same refusal on every rank when lengths, dtypes or counts differ between
/// ranks, or counts do not add up to the length; those of the communicator.
pub fn reduce_scatter(
    communicator: &dyn Communicator,
    flat: &Tensor,
    counts: &[i64],
) -> Result<Tensor> {
    let described = Described::new("flat", flat, counts);
    described.agree(communicator, |_, described| {
        let (length, sum) = (described.length(), described.sum());
        let problem = || format!("add up to {sum}, but `flat` has {length} elements");
        (sum != length).then(problem)
    })?;
    let _guard = tch::no_grad_guard();
    sum_parts(communicator, &flat.f_detach()?, counts)
}

/// The parts of all ranks one after another, of which rank r has `counts[r]`
/// elements.
///
/// `part` has one dimension, of any stride; parts may be empty.
///
/// # Errors
/// The same refusal on every rank when dtypes or counts differ between ranks,
/// or a part has not its count; those of the communicator.
pub fn all_gather(
    communicator: &dyn Communicator,
    part: &Tensor,
    counts: &[i64],
) -> Result<Tensor> {
    let described = Described::new("part", part, counts);
    described.agree(communicator, |rank, described| {
        let (length, due) = (described.length(), counts.get(rank)?);
        let problem = || format!("give rank {rank} {due} elements, but its `part` has {length}");
        (length != *due).then(problem)
    })?;
    let _guard = tch::no_grad_guard();
    join_parts(communicator, &part.f_detach()?, counts)
}

/// `total` elements as `parts` runs, the first of which have one more where it
/// does not divide.
pub(crate) fn near_even(total: i64, parts: usize) -> Vec<i64> {
    let (parts, each) = (parts as i64, total / parts.max(1) as i64);
    (0..parts)
        .map(|part| each + i64::from(part < total - each * parts))
        .collect()
}

fn sum_parts(communicator: &dyn Communicator, flat: &Tensor, counts: &[i64]) -> Result<Tensor> {
    let own = counts.get(communicator.rank()).copied().unwrap_or(0);
    let places = counts
        .iter()
        .map(|_| {
            Ok(vec![Tensor::f_empty(
                [own],
                (flat.f_kind()?, flat.device()),
            )?])
        })
        .collect::<Result<Vec<_>>>()?;
    communicator.all_to_all(&cut(flat, counts)?, &places)?;
    let kind = flat.f_kind()?;
    let wide = match kind {
        Kind::Half | Kind::BFloat16 => Kind::Float,
        kind => kind,
    };
    let mut parts = places.into_iter().flatten();
    // There is one for each rank, this rank's own among them.
    let Some(first) = parts.next() else {
        return Ok(Tensor::f_zeros([own], (kind, flat.device()))?);
    };
    let mut sum = first.f_to_kind(wide)?;
    for part in parts {
        sum = sum.f_add_(&part.f_to_kind(wide)?)?;
    }
    Ok(sum.f_to_kind(kind)?)
}

fn join_parts(communicator: &dyn Communicator, part: &Tensor, counts: &[i64]) -> Result<Tensor> {
    let total = counts.iter().sum::<i64>();
    let whole = Tensor::f_empty([total], (part.f_kind()?, part.device()))?;
    let send: Vec<_> = counts.iter().map(|_| vec![part.shallow_clone()]).collect();
    communicator.all_to_all(&send, &cut(&whole, counts)?)?;
    Ok(whole)
}

/// Views of so many elements each, one after another.
fn cut(flat: &Tensor, counts: &[i64]) -> Result<Vec<Vec<Tensor>>> {
    let mut start = 0;
    counts
        .iter()
        .map(|&count| {
            let part = flat.f_narrow(0, start, count)?;
            start += count;
            Ok(vec![part])
        })
        .collect()
}

/// What all ranks know of one rank's tensor and counts.
struct Described {
    argument: &'static str,
    words: Vec<i64>,
    /// Whether there are counts, and so one dimension.
    counted: bool,
}

impl Described {
    fn new(argument: &'static str, tensor: &Tensor, counts: &[i64]) -> Self {
        let kind = tensor.f_kind().ok();
        let dtype = KINDS.iter().position(|&(known, _)| Some(known) == kind);
        // An undefined tensor has no size to ask for.
        let size = kind.map_or_else(Vec::new, |_| tensor.size());
        let mut words = vec![
            dtype.map_or(-1, |dtype| dtype as i64),
            size.len() as i64,
            counts.len() as i64,
            counts.iter().copied().min().unwrap_or(0),
            counts.iter().copied().fold(0, i64::wrapping_add),
            digest(counts),
        ];
        words.extend((0..DIMENSIONS).map(|i| size.get(i).copied().unwrap_or(0)));
        Self {
            argument,
            words,
            counted: argument != "tensor",
        }
    }

    fn length(&self) -> i64 {
        self.words[6]
    }

    fn sum(&self) -> i64 {
        self.words[4]
    }

    fn shape(&self) -> &[i64] {
        &self.words[6..][..(self.words[1] as usize).min(DIMENSIONS)]
    }

    /// Gathers every rank's words and judges them, the same way on every rank.
    /// `fits` says what is wrong with the counts of a rank's tensor.
    fn agree(
        &self,
        communicator: &dyn Communicator,
        fits: impl Fn(usize, &Described) -> Option<String>,
    ) -> Result<()> {
        let gathered = communicator.all_gather(&self.words)?;
        let all: Vec<_> = gathered
            .into_iter()
            .map(|words| Described { words, ..*self })
            .collect();
        let refused = |rank, argument, problem, remedy: &str| {
            Err(Refusal {
                rank: Some(rank),
                argument,
                problem,
                remedy: remedy.to_owned(),
            }
            .into())
        };
        for (rank, described) in all.iter().enumerate() {
            if let Some((argument, problem, remedy)) = described.alone(all.len()) {
                return refused(rank, argument, problem, remedy);
            }
        }
        for (rank, described) in all.iter().enumerate() {
            if let Some((argument, problem, remedy)) = described.beside(&all[0]) {
                return refused(rank, argument, problem, remedy);
            }
        }
        for (rank, described) in all.iter().enumerate() {
            if let Some(problem) = fits(rank, described) {
                return refused(rank, "counts", problem, "count every element once");
            }
        }
        Ok(())
    }

    /// What one rank's words show by themselves, for a world of `size`.
    fn alone(&self, size: usize) -> Option<(&'static str, String, &'static str)> {
        let &[dtype, dimensions, counts, least, ..] = &self.words[..] else {
            return None;
        };
        let argument = self.argument;
        if dtype < 0 {
            let problem = "is undefined or of a dtype that has no sum".to_owned();
            return Some((argument, problem, "give numbers"));
        }
        if dimensions > DIMENSIONS as i64 {
            let problem = format!("has {dimensions} dimensions");
            return Some((argument, problem, "give at most 8"));
        }
        if self.counted && dimensions != 1 {
            let problem = format!("has shape {:?}", self.shape());
            return Some((argument, problem, "give one dimension"));
        }
        if self.counted && counts != size as i64 {
            let problem = format!("are for {counts} ranks in a world of {size}");
            return Some(("counts", problem, "give one for each rank"));
        }
        (least < 0).then(|| {
            let problem = format!("have {least} among them");
            ("counts", problem, "give numbers that are not negative")
        })
    }

    /// What one rank's words show beside those of rank 0.
    fn beside(&self, first: &Described) -> Option<(&'static str, String, &'static str)> {
        let name = |of: &Described| KINDS[of.words[0] as usize].1;
        if self.words[0] != first.words[0] {
            let problem = format!("is {}, but that of rank 0 is {}", name(self), name(first));
            return Some((self.argument, problem, "give every rank the same dtype"));
        }
        if self.words[2..6] != first.words[2..6] {
            let problem = "are not those of rank 0".to_owned();
            return Some(("counts", problem, "give every rank the same counts"));
        }
        // Parts may differ in length: their counts say how.
        let differ = self.argument != "part" && self.words != first.words;
        differ.then(|| {
            let (own, due) = (self.shape(), first.shape());
            let problem = format!("has shape {own:?}, but that of rank 0 has {due:?}");
            (self.argument, problem, "give every rank the same shape")
        })
    }
}

/// A few bits of all counts: FNV-1a, by words.
fn digest(counts: &[i64]) -> i64 {
    let fold = |digest: i64, &word: &i64| (digest ^ word).wrapping_mul(0x100_0000_01b3);
    counts.iter().fold(0x4bf2_9ce4_8422_2325, fold)
}
