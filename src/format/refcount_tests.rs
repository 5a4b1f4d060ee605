//! Tests of refcount entries: the layouts by example, all widths against a
//! model that looks at single bits.

use proptest::collection::vec;
use proptest::prelude::*;

use super::refcount::RefcountWidth;
use crate::error::ErrorKind;

fn width(order: u32) -> RefcountWidth {
    RefcountWidth::new(order).unwrap()
}

/// The refcounts of 16 bytes, as far as they are asked for.
fn entries(order: u32, bytes: &[u8], count: u64) -> Vec<u64> {
    (0..count).map(|index| width(order).get_in(bytes, index).unwrap()).collect()
}

/// Reads an entry bit by bit, straight from the format's definition.
fn model(order: u32, table: &[u8], index: usize) -> u64 {
    let bits = 1usize << order;
    let bit = |bit: usize| u64::from(table[bit / 8] >> (bit % 8) & 1);
    if bits < 8 {
        (0..bits).map(|at| bit(index * bits + at) << at).sum()
    } else {
        let bytes = bits / 8;
        table[index * bytes..][..bytes].iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
    }
}

#[test]
fn widths_are_1_to_64_bits() {
    for order in 0..=6 {
        let width = width(order);
        assert_eq!((width.order(), width.bits()), (order, 1 << order));
        assert_eq!(width.per_word() * u64::from(width.bits()), 64);
    }
    let maxima: Vec<u64> = (0..=6).map(|order| width(order).max()).collect();
    assert_eq!(maxima, [1, 3, 15, 255, 65535, u32::MAX.into(), u64::MAX]);
    for order in [7, 8, 64, u32::MAX] {
        assert_eq!(RefcountWidth::new(order).unwrap_err().kind(), ErrorKind::BadHeader);
    }
}

#[test]
fn entries_of_a_64_kib_block() {
    let counts: Vec<u64> = (0..=6).map(|order| width(order).entries_per(65536)).collect();
    assert_eq!(counts, [524288, 262144, 131072, 65536, 32768, 16384, 8192]);
    assert_eq!(width(6).entries_per(15), 1, "whole entries only");
    assert_eq!(width(0).entries_per(u64::MAX), u64::MAX, "no overflow");
}

#[test]
fn narrow_refcounts_are_packed_from_the_lowest_bit_of_each_byte() {
    let bytes = [0b1011_0010, 0x01, 0, 0, 0, 0, 0, 0x80];
    assert_eq!(entries(0, &bytes, 10), [0, 1, 0, 0, 1, 1, 0, 1, 1, 0]);
    assert_eq!(entries(1, &bytes, 5), [2, 0, 3, 2, 1]);
    assert_eq!(entries(2, &bytes, 3), [2, 11, 1]);
    assert_eq!(width(0).get_in(&bytes, 63), Some(1));
    assert_eq!(width(2).get_in(&bytes, 15), Some(8));
}

#[test]
fn wide_refcounts_are_big_endian() {
    let bytes = [1, 2, 3, 4, 5, 6, 7, 8, 0xff, 0, 0, 0, 0, 0, 0, 9];
    assert_eq!(entries(3, &bytes, 4), [1, 2, 3, 4]);
    assert_eq!(entries(4, &bytes, 5), [0x0102, 0x0304, 0x0506, 0x0708, 0xff00]);
    assert_eq!(entries(5, &bytes, 3), [0x0102_0304, 0x0506_0708, 0xff00_0000]);
    assert_eq!(entries(6, &bytes, 2), [0x0102_0304_0506_0708, 0xff00_0000_0000_0009]);
}

#[test]
fn nothing_lies_past_the_table() {
    for order in 0..=6 {
        let width = width(order);
        let mut table = [0xffu8; 23];
        let inside = 2 * width.per_word();
        assert_eq!(width.get_in(&table, inside - 1), Some(width.max()));
        for index in [inside, inside + 1, 1 << 40, u64::MAX] {
            assert_eq!(width.get_in(&table, index), None);
            assert_eq!(width.set_in(&mut table, index, 0), None);
        }
        assert_eq!(table, [0xff; 23]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn every_width_agrees_with_the_definition(order in 0..=6u32, table in vec(any::<u8>(), 64)) {
        let width = width(order);
        for index in 0..width.entries_per(64) {
            prop_assert_eq!(width.get_in(&table, index), Some(model(order, &table, index as usize)));
        }
    }

    #[test]
    fn an_entry_changes_alone(
        order in 0..=6u32,
        table in vec(any::<u8>(), 32),
        index in any::<u64>(),
        value in any::<u64>(),
    ) {
        let width = width(order);
        let index = index % width.entries_per(32);
        let value = value & width.max();
        let mut changed = table.clone();
        prop_assert_eq!(width.set_in(&mut changed, index, value), Some(()));
        for other in 0..width.entries_per(32) {
            let expected =
                if other == index { value } else { model(order, &table, other as usize) };
            prop_assert_eq!(model(order, &changed, other as usize), expected);
        }
    }

    #[test]
    fn words_and_slices_agree(
        order in 0..=6u32,
        word in any::<u64>(),
        index in any::<u64>(),
        value in any::<u64>(),
    ) {
        let width = width(order);
        let (value, in_word) = (value & width.max(), index % width.per_word());
        let mut bytes = word.to_be_bytes();
        prop_assert_eq!(width.get_in(&bytes, in_word), Some(width.get(word, index)));
        width.set_in(&mut bytes, in_word, value).unwrap();
        prop_assert_eq!(u64::from_be_bytes(bytes), width.set(word, index, value));
    }
}
