//! From a case that fails to the smallest that fails in the same way.
//!
//! Any implementation will do, since all that is needed is to ask it. The
//! search is greedy: one dimension of a case after the other is made as small
//! as it gets while the failure stays, the smallest value tried first, until a
//! whole round changes nothing. What it finds is small, and not proved to be
//! the smallest.

use std::collections::{BTreeSet, HashSet};
use std::time::{Duration, Instant};

use fixtures::batch::Stream;
use fixtures::extras::{Extras, Sharding, Strides};
use fixtures::loss::Ignored;
use fixtures::{
    AttentionCase, BatchCase, Case, Content, Documents, Dtype, LossCase, Mask, MeshCase, ModelCase,
    TiledCase, tiled,
};

use crate::diagnosis::Mistake;
use crate::implementation::{Implementation, Interrupt};
use crate::judge::{self, Due, Judgement, Verdict};
use crate::runner::{self, Record};

/// How many times a failure is asked again at most.
const ASKS: usize = 60;
/// For how many asks one counts that ends the ranks, so that fresh ones have to
/// be started.
const COLLAPSE: usize = 4;
/// How long a search goes on at most, but for the ask that it is in.
const TIME: Duration = Duration::from_secs(60);

/// In what way a case fails: two that are equal are taken for one failure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kind {
    verdict: Verdict,
    mistake: Option<Mistake>,
    /// Where there is no diagnosis.
    first_words: String,
}

/// What a search came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Smallest {
    /// The smallest case found, which may be the one that was given.
    pub case: Case,
    /// Whether the search ended for want of smaller cases, and not of time.
    pub is_complete: bool,
}

impl Kind {
    /// In what way this is a failure.
    pub fn of(judgement: &Judgement) -> Kind {
        let mistake = judgement.diagnosis.as_ref().and_then(|found| found.mistake);
        Kind {
            verdict: judgement.verdict,
            mistake,
            first_words: match mistake {
                Some(_) => String::new(),
                None => first_words(&judgement.sentence),
            },
        }
    }
}

/// The first three words, without numbers, and without which of several
/// questions it was.
fn first_words(sentence: &str) -> String {
    let sentence = match sentence.split_once(" questions: ") {
        Some((_, sentence)) => sentence,
        None => sentence,
    };
    let words = sentence.split_whitespace().take(3);
    let words: Vec<String> = words
        .map(|word| word.chars().filter(|c| !c.is_ascii_digit()).collect())
        .collect();
    words.join(" ")
}

/// The first failures of `records` that are of different kinds, at most so many.
pub fn distinct(records: &[Record], most: usize) -> Vec<&Record> {
    let mut kinds = Vec::new();
    let mut distinct = Vec::new();
    for record in records {
        let kind = Kind::of(&record.judgement);
        if record.judgement.verdict.is_failure() && !kinds.contains(&kind) {
            kinds.push(kind);
            distinct.push(record);
        }
    }
    distinct.truncate(most);
    distinct
}

/// The smallest case in which `implementation` fails as it did in `record`.
pub fn smallest(
    implementation: &mut dyn Implementation,
    record: &Record,
    interrupt: &Interrupt,
) -> Smallest {
    let mut search = Search {
        due: due(implementation, &record.case),
        implementation,
        interrupt,
        kind: Kind::of(&record.judgement),
        tried: HashSet::from([record.case.clone()]),
        asks: 0,
        end: Instant::now() + TIME,
    };
    let mut best = record.case.clone();
    loop {
        let before = best.clone();
        for dimension in 0..dimensions(&best) {
            let smaller = |best: &Case| smaller(dimension, best).into_iter();
            while let Some(case) = smaller(&best).find(|case| search.fails(case)) {
                best = case;
            }
        }
        if search.is_over() || best == before {
            return Smallest {
                case: best,
                is_complete: !search.is_over(),
            };
        }
    }
}

/// What is due from it, where it can be started and is asked this case.
fn due(implementation: &mut dyn Implementation, case: &Case) -> Option<Due> {
    let claims = implementation.claims(case.world()).ok()?;
    runner::due(case, &claims.features, &mut BTreeSet::new()).ok()
}

struct Search<'a> {
    implementation: &'a mut dyn Implementation,
    interrupt: &'a Interrupt,
    due: Option<Due>,
    kind: Kind,
    tried: HashSet<Case>,
    asks: usize,
    end: Instant,
}

impl Search<'_> {
    fn is_over(&self) -> bool {
        self.asks >= ASKS || Instant::now() >= self.end || self.interrupt.is_set()
    }

    /// Whether the case has a meaning, and fails in the same way.
    fn fails(&mut self, case: &Case) -> bool {
        if self.is_over() || case.check().is_err() || !self.tried.insert(case.clone()) {
            return false;
        }
        self.judgement(case)
            .is_some_and(|judgement| Kind::of(&judgement) == self.kind)
    }

    /// How the case is judged; none where something else is due than of the
    /// case that is searched from.
    fn judgement(&mut self, case: &Case) -> Option<Judgement> {
        let claims = match self.implementation.claims(case.world()) {
            Ok(claims) => claims,
            Err(failure) => return judge::without_answer(failure),
        };
        let due = runner::due(case, &claims.features, &mut BTreeSet::new()).ok()?;
        if self.due != Some(due) {
            return None;
        }
        let (record, _) = runner::ask(self.implementation, case, &claims, due)?;
        self.asks += match record.judgement.verdict {
            Verdict::Crash | Verdict::Hang => COLLAPSE,
            _ => 1,
        };
        Some(record.judgement)
    }
}

/// In how many ways a case may be smaller.
fn dimensions(case: &Case) -> usize {
    match case {
        Case::Attention(_) => DIMENSIONS.len(),
        Case::Loss(_) => LOSS_DIMENSIONS.len(),
        Case::Tiled(_) => TILED_DIMENSIONS.len(),
        Case::Batch(_) => BATCH_DIMENSIONS.len(),
        Case::Mesh(_) => MESH_DIMENSIONS.len(),
        Case::Model(_) => MODEL_DIMENSIONS.len(),
    }
}

/// The cases that are smaller in this dimension, the smallest first.
fn smaller(dimension: usize, case: &Case) -> Vec<Case> {
    match case {
        Case::Attention(case) => cases(DIMENSIONS[dimension](case)),
        Case::Loss(case) => cases(LOSS_DIMENSIONS[dimension](case)),
        Case::Tiled(case) => cases(TILED_DIMENSIONS[dimension](case)),
        Case::Batch(case) => cases(BATCH_DIMENSIONS[dimension](case)),
        Case::Mesh(case) => cases(MESH_DIMENSIONS[dimension](case)),
        Case::Model(case) => cases(MODEL_DIMENSIONS[dimension](case)),
    }
}

fn cases<T: Into<Case>>(cases: Vec<T>) -> Vec<Case> {
    cases.into_iter().map(T::into).collect()
}

/// The dimensions of a loss.
const LOSS_DIMENSIONS: [fn(&LossCase) -> Vec<LossCase>; 5] = [
    |case| with_each(case, 1..case.world, |case, world| case.world = world),
    |case| with_each(case, [1], |case, batch| case.batch = batch),
    |case| {
        let lengths = sizes(case.sequence, [1, 2, case.world, 2 * case.world]);
        with_each(case, lengths, |case, length| case.sequence = length)
    },
    |case| {
        let sizes = sizes(case.vocabulary, [1, 2, 4]);
        with_each(case, sizes, |case, size| case.vocabulary = size)
    },
    |case| {
        vec![
            with(case, |case| case.hidden = None),
            with(case, |case| case.cotangent = None),
            with(case, |case| case.is_large = false),
            with(case, |case| case.ignored = Ignored::Nothing),
            with(case, |case| case.dtype = Dtype::F32),
        ]
    },
];

/// The dimensions of a function in tiles.
const TILED_DIMENSIONS: [fn(&TiledCase) -> Vec<TiledCase>; 6] = [
    |case| with_each(case, 1..case.world, |case, world| case.world = world),
    |case| with_each(case, [1], |case, batch| case.batch = batch),
    |case| {
        let lengths = sizes(case.sequence, [1, 2, case.world, 2 * case.world]);
        with_each(case, lengths, |case, length| case.sequence = length)
    },
    |case| {
        with_each(case, sizes(case.tiles, [1, 2]), |case, tiles| {
            case.tiles = tiles
        })
    },
    |case| {
        let hidden = with_each(case, sizes(case.hidden, [1, 2]), |case, size| {
            case.hidden = size
        });
        let width = with_each(case, sizes(case.width, [1, 2]), |case, size| {
            case.width = size
        });
        hidden.into_iter().chain(width).collect()
    },
    |case| {
        vec![
            with(case, |case| case.is_passed = false),
            with(case, |case| case.frozen = None),
            with(case, |case| case.counts_signals = false),
            with(case, |case| case.cotangent = None),
            with(case, |case| case.ignored = tiled::Ignored::Nothing),
            with(case, |case| case.dtype = Dtype::F32),
        ]
    },
];

/// The dimensions of a model.
const MODEL_DIMENSIONS: [fn(&ModelCase) -> Vec<ModelCase>; 5] = [
    |case| with_each(case, 1..case.world, |case, world| case.world = world),
    |case| with_each(case, [1], |case, batch| case.batch = batch),
    |case| with_each(case, 1..case.layers, |case, layers| case.layers = layers),
    |case| {
        let lengths = sizes(case.sequence, [1, 2, case.sharing(), 2 * case.sharing()]);
        with_each(case, lengths, |case, length| case.sequence = length)
    },
    |case| {
        vec![
            with(case, |case| case.replicas = None),
            with(case, |case| case.documents = None),
            with(case, |case| case.is_checkpointed = false),
            with(case, |case| case.is_tied = false),
            with(case, |case| (case.theta, case.epsilon) = (None, None)),
            with(case, |case| case.cotangent = None),
            with(case, |case| case.ignored = Ignored::Nothing),
            with(case, |case| case.dtype = Dtype::F32),
        ]
    },
];

/// The dimensions of a batch.
const BATCH_DIMENSIONS: [fn(&BatchCase) -> Vec<BatchCase>; 5] = [
    |case| with_each(case, 1..case.world, |case, world| case.world = world),
    |case| with_each(case, [1], |case, batch| case.batch = batch),
    |case| {
        let lengths = sizes(case.sequence, [1, 2, case.world, 2 * case.world]);
        with_each(case, lengths, |case, length| case.sequence = length)
    },
    |case| {
        let Some(stream) = case.stream else {
            return Vec::new();
        };
        vec![
            with(case, |case| case.stream = None),
            with_stream(case, |stream| stream.epochs = 1),
            with_stream(case, |stream| stream.is_ragged = false),
            with_stream(case, |stream| stream.has_lengths = false),
            with_stream(case, |stream| stream.batches = 1),
            with_stream(case, |of| of.batches = stream.batches / 2),
        ]
    },
    |case| {
        vec![
            with(case, |case| case.sharding = Sharding::Contiguous),
            with(case, |case| {
                (case.documents, case.is_across) = (None, false)
            }),
            with(case, |case| case.is_across = false),
            with(case, |case| case.has_mask = false),
            with(case, |case| case.pad = None),
        ]
    },
];

fn with_stream(case: &BatchCase, change: impl FnOnce(&mut Stream)) -> BatchCase {
    with(case, |case| {
        if let Some(stream) = &mut case.stream {
            change(stream);
        }
    })
}

/// The dimensions of a mesh.
const MESH_DIMENSIONS: [fn(&MeshCase) -> Vec<MeshCase>; 2] = [
    |case| {
        let of = |sizes: [usize; 3]| {
            with(case, |case| {
                [case.dp_replicate, case.dp_shard, case.sp] = sizes;
                case.world = sizes.iter().product();
            })
        };
        let [replicas, shards, sp] = [case.dp_replicate, case.dp_shard, case.sp];
        vec![
            of([1, shards, sp]),
            of([replicas, 1, sp]),
            of([replicas, shards, 1]),
            of([replicas, shards, sp.min(2)]),
        ]
    },
    |case| {
        vec![
            with(case, |case| case.has_mpu = false),
            with(case, |case| case.has_sums = false),
        ]
    },
];

/// The cases that are smaller in one dimension, the smallest first.
type Dimension = fn(&AttentionCase) -> Vec<AttentionCase>;

/// Every dimension; first the one for which ranks are started anew.
const DIMENSIONS: [Dimension; 8] = [
    |case| with_each(case, 1..case.world, |case, world| case.world = world),
    without_one_extra,
    |case| with_each(case, [1], |case, batch| case.batch = batch),
    shorter,
    fewer_heads,
    |case| {
        let sizes = sizes(case.head_size, [1, 2, 4, 8, 16]);
        with_each(case, sizes, |case, size| case.head_size = size)
    },
    smaller_extras,
    |case| {
        vec![
            with(case, |case| case.mask = Mask::Full),
            with(case, |case| case.dtype = Dtype::F32),
            with(case, |case| case.content = Content::Gaussian),
            with(case, |case| case.seed = 0),
        ]
    },
];

fn with<C: Clone>(case: &C, change: impl FnOnce(&mut C)) -> C {
    let mut changed = case.clone();
    change(&mut changed);
    changed
}

fn with_each<C: Clone, T>(
    case: &C,
    values: impl IntoIterator<Item = T>,
    change: fn(&mut C, T),
) -> Vec<C> {
    let changed = values.into_iter();
    changed
        .map(|value| with(case, |case| change(case, value)))
        .collect()
}

/// These sizes, half of `size`, and one less than it: those that are smaller.
fn sizes(size: usize, more: impl IntoIterator<Item = usize>) -> BTreeSet<usize> {
    more.into_iter()
        .chain([size / 2, size.saturating_sub(1)])
        .filter(|smaller| (1..size).contains(smaller))
        .collect()
}

/// Lengths that the ranks divide, too, where they may not divide half of it.
fn shorter(case: &AttentionCase) -> Vec<AttentionCase> {
    let (length, ranks) = (case.sequence, case.world);
    let each = length / ranks;
    let lengths = [
        1,
        2,
        ranks,
        ranks + 1,
        2 * ranks,
        each / 2 * ranks,
        each.saturating_sub(1) * ranks,
    ];
    with_each(case, sizes(length, lengths), |case, length| {
        case.sequence = length;
    })
}

/// Fewer KV heads, and fewer query heads for each.
fn fewer_heads(case: &AttentionCase) -> Vec<AttentionCase> {
    let group = case.query_heads / case.kv_heads;
    let groups = sizes(group, [1, 2]).into_iter().chain([group]);
    let mut heads: Vec<(usize, usize)> = groups
        .flat_map(|group| {
            let kv_heads = sizes(case.kv_heads, [1, 2]);
            let kv_heads = kv_heads.into_iter().chain([case.kv_heads]);
            kv_heads.map(move |kv_heads| (group * kv_heads, kv_heads))
        })
        .filter(|heads| *heads != (case.query_heads, case.kv_heads))
        .collect();
    heads.sort_unstable();
    with_each(case, heads, |case, heads| {
        (case.query_heads, case.kv_heads) = heads;
    })
}

/// One optional part fewer. What is wrong with a question stays.
fn without_one_extra(case: &AttentionCase) -> Vec<AttentionCase> {
    const PARTS: [fn(&mut Extras); 20] = [
        |e| e.state = None,
        |e| e.value_size = None,
        |e| e.cross = None,
        |e| e.sharding = Sharding::Contiguous,
        |e| e.eval = false,
        |e| e.window = None,
        |e| e.documents = None,
        |e| e.padding = None,
        |e| e.block = None,
        |e| e.alibi = false,
        |e| e.sinks = false,
        |e| e.norms = false,
        |e| e.rotary = None,
        |e| e.softcap = None,
        |e| e.scale = None,
        |e| e.dropout = None,
        |e| e.strides = Strides::Contiguous,
        |e| e.recompute = false,
        |e| e.fixed = false,
        |e| e.debug = None,
    ];
    with_each(case, PARTS, |case, leave_out| leave_out(&mut case.extras))
}

/// Smaller numbers in the optional parts.
fn smaller_extras(case: &AttentionCase) -> Vec<AttentionCase> {
    let extras = &case.extras;
    let smaller = |size: Option<usize>| sizes(size.unwrap_or(0), [1, 2]);
    let mut cases = Vec::new();
    cases.extend(with_each(case, smaller(extras.value_size), |case, n| {
        case.extras.value_size = Some(n);
    }));
    cases.extend(with_each(case, smaller(extras.cross), |case, n| {
        case.extras.cross = Some(n);
    }));
    cases.extend(with_each(case, smaller(extras.window), |case, n| {
        case.extras.window = Some(n);
    }));
    cases.extend(with_each(case, smaller(extras.block), |case, n| {
        case.extras.block = Some(n);
    }));
    cases.extend(with_each(case, smaller(extras.debug), |case, n| {
        case.extras.debug = Some(n);
    }));
    let documents = smaller(extras.documents.map(Documents::count));
    cases.extend(with_each(case, documents, |case, n| {
        case.extras.documents = case.extras.documents.map(|documents| match documents {
            Documents::ByPosition(_) => Documents::ByPosition(n),
            Documents::ByEnds(_) => Documents::ByEnds(n),
        });
    }));
    cases
}
