//! Copies from one strided view to another, on the host.
//!
//! libtorch's `copy_` follows the order of the destination. From [B, s, H, D]
//! to [B, h, S, D] it reads a row of D elements, leaps over those of all other
//! heads, and comes back for each head: once the data outgrow the caches, that
//! is two thirds of the speed of memcpy. Here rows are copied in tiles that
//! stay within few pages on both sides, which is nearly all of it. What is not
//! made of rows is left to libtorch.
#![allow(unsafe_code)]

use std::cmp::Reverse;
use tch::{Device, Kind, TchError, Tensor};

/// Bytes that are copied of one head before the next: a page.
const TILE: usize = 4096;

/// Shorter rows are left to libtorch, which does not call memcpy for each.
const SHORTEST_ROW: usize = 64;

/// Writes `from` to `to`, in place. Both have one shape and one dtype.
pub(super) fn copy(from: &Tensor, to: &Tensor) -> Result<(), TchError> {
    match Plan::new(from, to) {
        Some(plan) => {
            plan.run();
            Ok(())
        }
        None => to.shallow_clone().f_copy_(from),
    }
}

/// A copy of rows, each contiguous on both sides.
struct Plan {
    from: *const u8,
    to: *mut u8,
    /// Bytes of a row.
    row: usize,
    /// Where the rows lie: at least two dimensions, by descending distance in
    /// the destination.
    dimensions: Vec<Dimension>,
}

/// So many steps of so many bytes.
#[derive(Clone, Copy)]
struct Dimension {
    count: usize,
    from: usize,
    to: usize,
}

impl Plan {
    /// Nothing where libtorch has to do it.
    fn new(from: &Tensor, to: &Tensor) -> Option<Self> {
        if ![from, to].into_iter().all(is_plain) {
            return None;
        }
        let element = from.f_kind().ok()?.elt_size_in_bytes();
        let bytes = |stride: i64| usize::try_from(stride).ok().map(|s| s * element);
        let mut dimensions = Vec::new();
        for ((size, from), to) in from.size().into_iter().zip(from.stride()).zip(to.stride()) {
            let (count, from, to) = (usize::try_from(size).ok()?, bytes(from)?, bytes(to)?);
            // Nothing to do, or several values for one place: libtorch knows
            // what to say.
            if count == 0 || (count > 1 && to == 0) {
                return None;
            }
            if count > 1 {
                dimensions.push(Dimension { count, from, to });
            }
        }
        dimensions.sort_by_key(|dimension| Reverse(dimension.to));
        let extent = |step: fn(&Dimension) -> usize| {
            let steps = dimensions.iter().map(|d| (d.count - 1) * step(d));
            steps.sum::<usize>() + element
        };
        let (read, written) = (extent(|d| d.from), extent(|d| d.to));
        let (from, to) = (from.data_ptr().cast_const().cast(), to.data_ptr().cast());
        if overlap((from, read), (to, written)) {
            return None;
        }
        let row = take_row(&mut dimensions, element);
        merge(&mut dimensions);
        while dimensions.len() < 2 {
            let (count, from, to) = (1, 0, 0);
            dimensions.insert(0, Dimension { count, from, to });
        }
        (row >= SHORTEST_ROW).then_some(Self {
            from,
            to,
            row,
            dimensions,
        })
    }

    fn run(&self) {
        // SAFETY: the dimensions are those of two tensors that are alive, so
        // every row lies inside their memory; and they do not overlap.
        unsafe { self.walk(&self.dimensions, self.from, self.to) }
    }

    /// # Safety
    /// From `from` and `to` on, the rows of `dimensions` lie in memory that may
    /// be read and written, and the two do not overlap.
    unsafe fn walk(&self, dimensions: &[Dimension], from: *const u8, to: *mut u8) {
        match dimensions {
            [middle, inner] => {
                let tile = (TILE / self.row).max(1);
                for start in (0..inner.count).step_by(tile) {
                    let rows = tile.min(inner.count - start);
                    for m in 0..middle.count {
                        // These wrap so that nothing is checked for each row in
                        // a build with assertions, which halves the speed.
                        let mut from = from.wrapping_add(m * middle.from + start * inner.from);
                        let mut to = to.wrapping_add(m * middle.to + start * inner.to);
                        for _ in 0..rows {
                            // SAFETY: by the caller.
                            unsafe { from.copy_to_nonoverlapping(to, self.row) };
                            from = from.wrapping_add(inner.from);
                            to = to.wrapping_add(inner.to);
                        }
                    }
                }
            }
            [first, rest @ ..] => {
                for i in 0..first.count {
                    let from = from.wrapping_add(i * first.from);
                    // SAFETY: these are some of the caller's rows.
                    unsafe { self.walk(rest, from, to.wrapping_add(i * first.to)) };
                }
            }
            [] => {}
        }
    }
}

/// Whether the values of a tensor lie in the memory of the host as they are.
pub(super) fn is_plain(tensor: &Tensor) -> bool {
    is_valued(tensor) && tensor.device() == Device::Cpu
}

/// Whether the values of a tensor lie in the memory of its device as they are.
pub(super) fn is_valued(tensor: &Tensor) -> bool {
    use Kind::{BFloat16, Bool, Double, Float, Half, Int, Int8, Int16, Int64, Uint8};
    let kind = tensor.f_kind();
    matches!(
        kind,
        Ok(Double | Float | BFloat16 | Half | Int64 | Int | Int16 | Int8 | Uint8 | Bool)
    ) && !tensor.is_sparse()
        && !tensor.is_mkldnn()
        // A view of a complex number may have its sign elsewhere.
        && matches!(tensor.f_is_neg(), Ok(false))
}

fn overlap((a, a_bytes): (*const u8, usize), (b, b_bytes): (*mut u8, usize)) -> bool {
    a.addr() < b.addr() + b_bytes && b.addr() < a.addr() + a_bytes
}

/// Takes the dimensions that are contiguous on both sides off the end; gives
/// the bytes of that row.
fn take_row(dimensions: &mut Vec<Dimension>, element: usize) -> usize {
    let mut row = element;
    while let Some(last) = dimensions.pop_if(|last| last.from == row && last.to == row) {
        row *= last.count;
    }
    row
}

/// Makes one of neighbouring dimensions that can be walked as one.
fn merge(dimensions: &mut Vec<Dimension>) {
    dimensions.dedup_by(|inner, outer| {
        let follows = |outer: usize, inner_step: usize| outer == inner_step * inner.count;
        let one = follows(outer.from, inner.from) && follows(outer.to, inner.to);
        if one {
            *outer = Dimension {
                count: outer.count * inner.count,
                ..*inner
            };
        }
        one
    });
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    /// Memory full of 77, and a view of it: of `size`, with its dimensions in
    /// the order `order`, and a gap after each run of the last of them.
    fn laid_out(size: &[i64], order: &[usize], gap: i64, kind: Kind) -> (Tensor, Tensor) {
        let last = order.len() - 1;
        let mut room: Vec<i64> = order.iter().map(|&i| size[i]).collect();
        room[last] += gap;
        let memory = Tensor::full(room, 77, (kind, Device::Cpu));
        let mut back = vec![0; order.len()];
        for (position, &i) in order.iter().enumerate() {
            back[i] = position as i64;
        }
        let view = memory.narrow(last as i64, gap, size[order[last]]);
        (memory, view.permute(back))
    }

    type Layout = (Vec<usize>, i64);

    /// A size, a dtype, and how source and destination lie. The first
    /// dimensions trade places, as in an exchange; the last seldom does.
    fn layouts() -> impl Strategy<Value = (Vec<i64>, Kind, Layout, Layout)> {
        let sizes = (
            prop::collection::vec(1..=5i64, 0..=3),
            prop_oneof![1..=3i64, 16..=90i64],
        );
        sizes.prop_flat_map(|(mut size, last)| {
            let outer: Vec<usize> = (0..size.len()).collect();
            size.push(last);
            let layout = || {
                let order = (Just(outer.clone()).prop_shuffle(), 0..5u8);
                let order = order.prop_map(|(mut order, first)| {
                    let place = if first == 0 { 0 } else { order.len() };
                    order.insert(place, order.len());
                    order
                });
                (order, prop_oneof![Just(0), 1..=3i64])
            };
            let kinds = vec![Kind::Double, Kind::Float, Kind::Half, Kind::Uint8];
            let kind = prop::sample::select(kinds);
            (Just(size), kind, layout(), layout())
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            cases: 512,
            failure_persistence: None,
            ..ProptestConfig::default()
        })]

        // The whole memory is compared: gaps stay as they are.
        #[test]
        fn every_layout_is_copied_as_libtorch_copies_it(
            (size, kind, source, place) in layouts()
        ) {
            let (_, from) = laid_out(&size, &source.0, source.1, kind);
            let count = size.iter().product::<i64>();
            let values = Tensor::arange(count, (Kind::Int64, Device::Cpu)).remainder(63);
            from.shallow_clone().copy_(&values.view(size.as_slice()));
            let (ours, to) = laid_out(&size, &place.0, place.1, kind);
            copy(&from, &to).unwrap();
            let (due, to) = laid_out(&size, &place.0, place.1, kind);
            to.shallow_clone().copy_(&from);
            prop_assert_eq!(ours, due);
        }
    }

    const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);

    fn is_planned(from: &Tensor, to: &Tensor) -> bool {
        Plan::new(from, to).is_some()
    }

    #[test]
    fn the_blocks_of_an_exchange_are_copied_in_rows() {
        let (sequence, heads) = ([2, 6, 8, 16], [2, 4, 12, 16]);
        let block = Tensor::rand(sequence, FLOAT).narrow(2, 4, 4);
        let place = Tensor::zeros(heads, FLOAT).narrow(2, 6, 6).transpose(1, 2);
        assert!(is_planned(&block, &place) && is_planned(&place, &block));
        let one_row = Tensor::rand([16], FLOAT)
            .expand(sequence, false)
            .narrow(2, 4, 4);
        assert!(is_planned(&one_row, &place));
    }

    #[test]
    fn what_rows_cannot_do_is_left_to_libtorch() {
        let x = Tensor::rand([4, 32], FLOAT);
        let y = Tensor::zeros([4, 32], FLOAT);
        let overlapping = x.view([-1]).narrow(0, 1, 64);
        assert!(!is_planned(&x.view([-1]).narrow(0, 0, 64), &overlapping));
        assert!(!is_planned(
            &x,
            &Tensor::zeros([32], FLOAT).expand([4, 32], false)
        ));
        assert!(!is_planned(&x.narrow(0, 0, 0), &y.narrow(0, 0, 0)));
        assert!(!is_planned(
            &x.transpose(0, 1),
            &y.transpose(0, 1).contiguous()
        ));
        // The signs of this view are not in its memory.
        let negative = x.f_internal_neg_view().unwrap();
        copy(&negative, &y).unwrap();
        assert_eq!(y, -&x);
    }
}
