//! What is due from the ranks in the profiles other than attention, number by
//! number.
//!
//! Deliberately not here: how far a number may be off, which the judge makes of
//! its root.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::thread::LocalKey;

use fixtures::exchange::{Declared, Upstream};
use fixtures::{Case, Dtype};

use super::rounding::RoundedNumbers;
use super::{batch, loss, mesh, model, tiled};
use crate::diagnosis::Mistake;

/// One tensor that is due.
#[derive(Clone, Debug)]
pub(crate) struct DueTensor {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    /// In row-major order.
    pub(crate) right: Vec<f64>,
    /// By how much roundings move each: 0 where none does.
    pub(crate) roots: Vec<f64>,
}

impl DueTensor {
    /// Integers, which are right or wrong.
    pub(super) fn exactly(shape: &[usize], numbers: &[i64]) -> DueTensor {
        DueTensor {
            dtype: Dtype::I64,
            shape: shape.to_vec(),
            right: numbers.iter().map(|&number| number as f64).collect(),
            roots: vec![0.0; numbers.len()],
        }
    }

    /// What the oracle computed under this name.
    pub(super) fn take(
        computed: &mut BTreeMap<String, RoundedNumbers>,
        name: &str,
        dtype: Dtype,
        shape: Vec<usize>,
    ) -> Result<DueTensor, String> {
        let numbers = computed.remove(name);
        let RoundedNumbers { right, roots } =
            numbers.ok_or_else(|| format!("the oracle has no {name}"))?;
        Ok(DueTensor {
            dtype,
            shape,
            right,
            roots,
        })
    }
}

/// By what the gradients of one loss of all ranks are multiplied on each.
pub(super) fn upstream(declared: Declared, world: usize) -> f64 {
    match declared.upstream {
        Upstream::Share => 1.0,
        Upstream::TimesRanks => world as f64,
    }
}

/// What is due from all ranks.
#[derive(Clone, Debug, Default)]
pub(crate) struct DueAnswer {
    /// From each rank, by name.
    pub(crate) ranks: Vec<BTreeMap<String, DueTensor>>,
    /// From all ranks together: each gives a part in this shape, and the sum of
    /// the parts is due.
    pub(crate) sums: BTreeMap<String, DueTensor>,
    /// What no rank may answer: gradients of what is frozen.
    pub(crate) undue: Vec<String>,
}

/// What was found of the case that was asked of last.
type Last<T> = RefCell<Option<(Case, Declared, Rc<T>)>>;

/// What comes of each mistake.
pub(crate) type Mistaken = Vec<(Mistake, DueAnswer)>;

thread_local! {
    // A run over many faults asks the same again and again.
    static DUE: Last<DueAnswer> = const { RefCell::new(None) };
    static MISTAKEN: Last<Mistaken> = const { RefCell::new(None) };
}

/// What is found of a case, or was when it was asked last.
fn found<T>(
    last: &'static LocalKey<Last<T>>,
    case: &Case,
    declared: Declared,
    find: impl FnOnce() -> Result<T, String>,
) -> Result<Rc<T>, String> {
    let known = last.with_borrow(|last| match last {
        Some((of, by, found)) if (of, *by) == (case, declared) => Some(Rc::clone(found)),
        _ => None,
    });
    if let Some(known) = known {
        return Ok(known);
    }
    let found = Rc::new(find()?);
    last.set(Some((case.clone(), declared, Rc::clone(&found))));
    Ok(found)
}

/// What is due in `case` from who declares this.
///
/// # Errors
///
/// Why there is no right answer.
pub(crate) fn due(case: &Case, declared: Declared) -> Result<Rc<DueAnswer>, String> {
    found(&DUE, case, declared, || match case {
        Case::Attention(_) => Err("attention has a judge of its own".to_owned()),
        Case::Loss(case) => loss::due(case, declared, None),
        Case::Tiled(case) => tiled::due(case, declared, None),
        Case::Batch(case) => Ok(batch::due(case, None)),
        Case::Mesh(case) => Ok(mesh::due(case, None)),
        Case::Model(case) => model::due(case, declared, None),
    })
}

/// What else would have come, had a mistake been made: each mistake that changes
/// the answer to `case`, and what it makes of it, without roots.
///
/// # Errors
///
/// As for [`due`].
pub(crate) fn mistaken(case: &Case, declared: Declared) -> Result<Rc<Mistaken>, String> {
    found(&MISTAKEN, case, declared, || match case {
        Case::Attention(_) => Ok(Vec::new()),
        Case::Loss(case) => loss::MISTAKES
            .iter()
            .map(|&mistake| Ok((mistake, loss::due(case, declared, Some(mistake))?)))
            .collect(),
        Case::Tiled(case) => tiled::MISTAKES
            .iter()
            .map(|&mistake| Ok((mistake, tiled::due(case, declared, Some(mistake))?)))
            .collect(),
        Case::Batch(case) => Ok(batch::MISTAKES
            .map(|mistake| (mistake, batch::due(case, Some(mistake))))
            .into()),
        Case::Mesh(case) => Ok(mesh::MISTAKES
            .map(|mistake| (mistake, mesh::due(case, Some(mistake))))
            .into()),
        Case::Model(case) => model::MISTAKES
            .iter()
            .map(|&mistake| Ok((mistake, model::due(case, declared, Some(mistake))?)))
            .collect(),
    })
}
