//! Pickles, as far as data sets use them: dictionaries, lists, tuples, numbers, texts and NumPy arrays, as Python 2 and
//! 3 write them in protocols 2 to 5. Nothing that a pickle names is executed. The few names of NumPy that arrays need
//! have a meaning here; any other name is an error.
//!
//! A value is a small handle, and whatever is long stays where it is in the file. So memory is bounded: a file may have
//! one value per [`BYTES_PER_VALUE`] of its bytes, and [`SPARE_VALUES`] more.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;

use super::DataError;
use super::error::excerpt;

/// A data set has far fewer values than this allows: most of its bytes are pixels.
const BYTES_PER_VALUE: usize = 64;
const SPARE_VALUES: usize = 4096;

/// A number, or where an object is.
#[derive(Clone, Copy)]
enum Value {
    None,
    Integer(i64),
    Name(Name),
    Object(usize),
}

/// The names that may be called.
#[derive(Clone, Copy, PartialEq)]
enum Name {
    /// `numpy.core.multiarray._reconstruct`: an array, which a state then fills.
    Reconstruct,
    /// `numpy.core.numeric._frombuffer`: an array of protocol 5.
    FromBuffer,
    /// `numpy.core.multiarray.scalar`: a single number.
    Scalar,
    /// `numpy.dtype`.
    Dtype,
    /// `numpy.ndarray`, an argument of `_reconstruct`.
    Ndarray,
    /// `_codecs.encode`: bytes that are written as text.
    Encode,
}

impl Name {
    fn of(module: &[u8], name: &[u8]) -> Option<Self> {
        Some(match (module, name) {
            (b"numpy.core.multiarray" | b"numpy._core.multiarray", b"_reconstruct") => Self::Reconstruct,
            (b"numpy.core.multiarray" | b"numpy._core.multiarray", b"scalar") => Self::Scalar,
            (b"numpy.core.numeric" | b"numpy._core.numeric", b"_frombuffer") => Self::FromBuffer,
            (b"numpy", b"dtype") => Self::Dtype,
            (b"numpy", b"ndarray") => Self::Ndarray,
            (b"_codecs", b"encode") => Self::Encode,
            _ => return None,
        })
    }
}

enum Object<'a> {
    /// Bytes, or a text in UTF-8.
    Bytes(&'a [u8]),
    /// Bytes that are written as a text in UTF-8 with a character for each.
    Latin1(&'a [u8]),
    Tuple(Vec<Value>),
    List(Vec<Value>),
    Dictionary(Vec<(Value, Value)>),
    /// The type of an array's elements: `u1`, `i8`.
    Dtype {
        code: &'a [u8],
        big_endian: bool,
    },
    /// An array in C order. It is empty until its state has been read.
    Array {
        shape: Value,
        dtype: Value,
        data: Value,
    },
}

/// A pickle that was read.
pub(super) struct Pickle<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    /// How many bytes were read.
    at: usize,
    objects: Vec<Object<'a>>,
    stack: Vec<Value>,
    /// Lengths of the stack at its marks.
    marks: Vec<usize>,
    memo: HashMap<usize, Value>,
    /// How many more values the file may have.
    values_left: usize,
}

type Result<T> = std::result::Result<T, DataError>;

impl<'a> Pickle<'a> {
    /// Reads a file, whose path is for errors.
    pub fn read(path: &'a Path, bytes: &'a [u8]) -> Result<Self> {
        let values_left = SPARE_VALUES + bytes.len() / BYTES_PER_VALUE;
        let (objects, stack, marks, memo) = (Vec::new(), Vec::new(), Vec::new(), HashMap::new());
        let mut pickle = Self { path, bytes, at: 0, objects, stack, marks, memo, values_left };
        if bytes.first() != Some(&0x80) {
            let start = excerpt(&bytes[..bytes.len().min(12)]);
            return Err(pickle.error(format!("it begins with `{start}`, and not with a protocol from 2 to 5")));
        }
        while pickle.step()? {}
        match bytes.len() - pickle.at {
            0 => Ok(pickle),
            rest => Err(pickle.error(format!("{rest} bytes behind its end"))),
        }
    }

    fn error(&self, reason: impl Into<String>) -> DataError {
        DataError::Pickle { path: self.path.into(), reason: reason.into() }
    }

    // ---- Bytes ----

    fn take(&mut self, count: usize) -> Result<&'a [u8]> {
        let rest = &self.bytes[self.at..];
        let Some((taken, _)) = rest.split_at_checked(count) else {
            return Err(self.error(format!("it ends at byte {}, before its last value does", self.bytes.len())));
        };
        self.at += count;
        Ok(taken)
    }

    /// An unsigned number of so many bytes.
    fn number(&mut self, bytes: usize) -> Result<usize> {
        let number = self.take(bytes)?.iter().rev().fold(0u64, |number, &byte| number << 8 | u64::from(byte));
        Ok(usize::try_from(number).unwrap_or(usize::MAX))
    }

    /// A signed number of at most eight bytes.
    fn signed(&mut self, bytes: usize) -> Result<i64> {
        if bytes > 8 {
            return Err(self.error(format!("a number of {bytes} bytes, expected at most 8")));
        }
        let bytes = self.take(bytes)?;
        let start = if bytes.last().is_some_and(|byte| byte & 0x80 != 0) { -1 } else { 0 };
        Ok(bytes.iter().rev().fold(start, |number: i64, &byte| number << 8 | i64::from(byte)))
    }

    fn line(&mut self) -> Result<&'a [u8]> {
        let rest = &self.bytes[self.at..];
        let length = rest.iter().position(|&byte| byte == b'\n').unwrap_or(rest.len());
        let line = self.take(length)?;
        self.take(1)?;
        Ok(line)
    }

    // ---- The stack ----

    fn count_value(&mut self) -> Result<()> {
        match self.values_left.checked_sub(1) {
            Some(left) => self.values_left = left,
            None => return Err(self.error("more values than a data set of its length has")),
        }
        Ok(())
    }

    fn push(&mut self, value: Value) -> Result<()> {
        self.count_value()?;
        self.stack.push(value);
        Ok(())
    }

    fn push_object(&mut self, object: Object<'a>) -> Result<()> {
        self.push(Value::Object(self.objects.len()))?;
        self.objects.push(object);
        Ok(())
    }

    fn push_bytes(&mut self, length_bytes: usize) -> Result<()> {
        let length = self.number(length_bytes)?;
        let bytes = self.take(length)?;
        self.push_object(Object::Bytes(bytes))
    }

    /// Where the values begin that may be taken: behind the last mark.
    fn floor(&self) -> usize {
        self.marks.last().copied().unwrap_or(0)
    }

    fn pop(&mut self) -> Result<Value> {
        let value = if self.stack.len() > self.floor() { self.stack.pop() } else { None };
        value.ok_or_else(|| self.error("it takes a value where there is none"))
    }

    fn top(&self) -> Result<Value> {
        let value = if self.stack.len() > self.floor() { self.stack.last() } else { None };
        value.copied().ok_or_else(|| self.error("it uses a value where there is none"))
    }

    /// The values behind the last mark.
    fn pop_to_mark(&mut self) -> Result<Vec<Value>> {
        match self.marks.pop() {
            Some(mark) => Ok(self.stack.split_off(mark)),
            None => Err(self.error("it ends a sequence that has no beginning")),
        }
    }

    fn push_tuple(&mut self, length: usize) -> Result<()> {
        let mut values = (0..length).map(|_| self.pop()).collect::<Result<Vec<_>>>()?;
        values.reverse();
        self.push_object(Object::Tuple(values))
    }

    fn append(&mut self, values: Vec<Value>) -> Result<()> {
        let list = self.top()?;
        match self.object_mut(list) {
            Some(Object::List(list)) => list.extend(values),
            _ => return Err(self.error("it appends to what is no list")),
        }
        Ok(())
    }

    fn set_items(&mut self, values: &[Value]) -> Result<()> {
        let dictionary = self.top()?;
        match self.object_mut(dictionary) {
            Some(Object::Dictionary(items)) if values.len().is_multiple_of(2) => {
                items.extend(values.chunks_exact(2).map(|item| (item[0], item[1])));
                Ok(())
            }
            _ => Err(self.error("it puts items into what is no dictionary")),
        }
    }

    // ---- Operations ----

    /// Runs the next operation. False after the last one.
    fn step(&mut self) -> Result<bool> {
        let at = self.at;
        let operation = self.take(1)?[0];
        match operation {
            // Protocol and frames say nothing about the values.
            0x80 => drop(self.take(1)?),
            0x95 => drop(self.take(8)?),
            b'.' => {
                let value = self.pop()?;
                self.stack = vec![value];
                return Ok(false);
            }
            b'N' => self.push(Value::None)?,
            0x88 => self.push(Value::Integer(1))?,
            0x89 => self.push(Value::Integer(0))?,
            b'K' | b'M' => {
                let number = self.number(if operation == b'K' { 1 } else { 2 })?;
                self.push(Value::Integer(number as i64))?;
            }
            b'J' | 0x8a => {
                let bytes = if operation == b'J' { 4 } else { self.number(1)? };
                let number = self.signed(bytes)?;
                self.push(Value::Integer(number))?;
            }
            b'U' | b'C' | 0x8c => self.push_bytes(1)?,
            b'T' | b'B' | b'X' => self.push_bytes(4)?,
            0x8d | 0x8e | 0x96 => self.push_bytes(8)?,
            b'(' => {
                self.count_value()?;
                self.marks.push(self.stack.len());
            }
            b')' => self.push_tuple(0)?,
            0x85..=0x87 => self.push_tuple(usize::from(operation - 0x84))?,
            b't' => {
                let values = self.pop_to_mark()?;
                self.push_object(Object::Tuple(values))?;
            }
            b']' => self.push_object(Object::List(Vec::new()))?,
            b'a' => {
                let value = self.pop()?;
                self.append(vec![value])?;
            }
            b'e' => {
                let values = self.pop_to_mark()?;
                self.append(values)?;
            }
            b'}' => self.push_object(Object::Dictionary(Vec::new()))?,
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.set_items(&[key, value])?;
            }
            b'u' => {
                let values = self.pop_to_mark()?;
                self.set_items(&values)?;
            }
            b'q' | b'r' | 0x94 | b'h' | b'j' => self.remember(operation)?,
            b'c' | 0x93 => self.push_name(operation)?,
            b'R' => self.call()?,
            b'b' => self.fill()?,
            _ => {
                return Err(
                    self.error(format!("operation {operation:#04x} at byte {at}, which a data set does not use"))
                );
            }
        }
        Ok(true)
    }

    /// Stores the last value under a number, or takes a stored one.
    fn remember(&mut self, operation: u8) -> Result<()> {
        let key = match operation {
            b'q' | b'h' => self.number(1)?,
            b'r' | b'j' => self.number(4)?,
            _ => self.memo.len(),
        };
        if matches!(operation, b'h' | b'j') {
            return match self.memo.get(&key) {
                Some(&value) => self.push(value),
                None => Err(self.error(format!("it uses value {key} before it stores it"))),
            };
        }
        self.count_value()?;
        let value = self.top()?;
        self.memo.insert(key, value);
        Ok(())
    }

    /// A name, from two lines of the file or from two texts.
    fn push_name(&mut self, operation: u8) -> Result<()> {
        let (module, name) = if operation == b'c' {
            (self.line()?, self.line()?)
        } else {
            let (name, module) = (self.pop()?, self.pop()?);
            self.text(module).zip(self.text(name)).ok_or_else(|| self.error("a name that is no text"))?
        };
        match Name::of(module, name) {
            Some(name) => self.push(Value::Name(name)),
            None => {
                let name = format!("{}.{}", excerpt(module), excerpt(name));
                Err(DataError::PickleName { path: self.path.into(), name })
            }
        }
    }

    /// What a call of a name with a tuple of arguments stands for.
    fn call(&mut self) -> Result<()> {
        let (arguments, name) = (self.pop()?, self.pop()?);
        let Some(Object::Tuple(arguments)) = self.object(arguments) else {
            return Err(self.error("a call without arguments"));
        };
        let argument = |index: usize| arguments.get(index).copied().unwrap_or(Value::None);
        let object = match name {
            Value::Name(Name::Reconstruct) => {
                Object::Array { shape: Value::None, dtype: Value::None, data: Value::None }
            }
            Value::Name(Name::FromBuffer) if self.text(argument(3)) == Some(b"C") => {
                Object::Array { shape: argument(2), dtype: argument(1), data: argument(0) }
            }
            Value::Name(Name::Scalar) => {
                let (dtype, data) = (argument(0), argument(1));
                let number = self.array_integers(dtype, data).filter(|numbers| numbers.len() == 1);
                let number = number.ok_or_else(|| self.error("a number of NumPy's that is no integer"))?;
                return self.push(Value::Integer(number[0]));
            }
            Value::Name(Name::Dtype) => {
                let code = self.text(argument(0)).ok_or_else(|| self.error("a type without a name"))?;
                Object::Dtype { code, big_endian: false }
            }
            Value::Name(Name::Encode) if matches!(self.text(argument(1)), Some(b"latin1" | b"latin-1")) => {
                let text = self.text(argument(0)).ok_or_else(|| self.error("an encoding of what is no text"))?;
                Object::Latin1(text)
            }
            _ => return Err(self.error("a call that makes no array")),
        };
        self.push_object(object)
    }

    /// Gives an array or a type its state.
    fn fill(&mut self) -> Result<()> {
        let (state, filled) = (self.pop()?, self.top()?);
        let Some(Object::Tuple(state)) = self.object(state) else {
            return Err(self.error("a state that is no tuple"));
        };
        let part = |index: usize| state.get(index).copied().unwrap_or(Value::None);
        let object = match self.object(filled) {
            Some(Object::Dtype { code, .. }) => Object::Dtype { code, big_endian: self.text(part(1)) == Some(b">") },
            Some(Object::Array { .. }) if matches!(part(3), Value::Integer(0)) => {
                Object::Array { shape: part(1), dtype: part(2), data: part(4) }
            }
            Some(Object::Array { .. }) => return Err(self.error("an array that is not in C order")),
            _ => return Err(self.error("a state of what is no array")),
        };
        if let Some(filled) = self.object_mut(filled) {
            *filled = object;
        }
        Ok(())
    }

    // ---- Values ----

    fn object(&self, value: Value) -> Option<&Object<'a>> {
        match value {
            Value::Object(index) => self.objects.get(index),
            _ => None,
        }
    }

    fn object_mut(&mut self, value: Value) -> Option<&mut Object<'a>> {
        match value {
            Value::Object(index) => self.objects.get_mut(index),
            _ => None,
        }
    }

    fn text(&self, value: Value) -> Option<&'a [u8]> {
        match self.object(value)? {
            Object::Bytes(text) => Some(text),
            _ => None,
        }
    }

    /// The bytes of a value, decoded if they were written as text.
    fn bytes_of(&self, value: Value) -> Option<Cow<'a, [u8]>> {
        match self.object(value)? {
            Object::Bytes(bytes) => Some(Cow::Borrowed(bytes)),
            Object::Latin1(text) => {
                let text = str::from_utf8(text).ok()?;
                let bytes = text.chars().map(|character| u8::try_from(u32::from(character)).ok());
                bytes.collect::<Option<Vec<u8>>>().map(Cow::Owned)
            }
            _ => None,
        }
    }

    /// The value of a key of the dictionary that is the whole pickle.
    fn get(&self, key: &str) -> Result<Value> {
        let root = self.stack.last().copied().unwrap_or(Value::None);
        let Some(Object::Dictionary(items)) = self.object(root) else {
            return Err(self.error("it holds no dictionary"));
        };
        let is_key = |name: &Value| match self.object(*name) {
            Some(Object::Bytes(name) | Object::Latin1(name)) => *name == key.as_bytes(),
            _ => false,
        };
        let found = items.iter().rev().find(|(name, _)| is_key(name));
        found.map(|(_, value)| *value).ok_or_else(|| self.error(format!("it has no `{key}`")))
    }

    /// The sizes of an array.
    fn shape(&self, shape: Value) -> Option<Vec<usize>> {
        let Object::Tuple(sizes) = self.object(shape)? else { return None };
        let size = |size: &Value| match size {
            Value::Integer(size) => usize::try_from(*size).ok(),
            _ => None,
        };
        sizes.iter().map(size).collect()
    }

    /// The rows of an array of bytes: how many, of `columns` each, and all of them. There is at least one.
    pub fn bytes_by_rows(&self, key: &str, columns: usize) -> Result<(usize, Cow<'a, [u8]>)> {
        let wrong = |found: &str| self.error(format!("`{key}` is {found}, expected rows of {columns} unsigned bytes"));
        let Some(Object::Array { shape, dtype, data }) = self.object(self.get(key)?) else {
            return Err(wrong("no array"));
        };
        match self.object(*dtype) {
            Some(Object::Dtype { code: b"u1", .. }) => {}
            Some(Object::Dtype { code, .. }) => return Err(wrong(&format!("an array of {}", excerpt(code)))),
            _ => return Err(wrong("an array without a type")),
        }
        let rows = match self.shape(*shape).as_deref() {
            Some(&[rows, found]) if found == columns && rows > 0 => rows,
            Some(sizes) if sizes.len() <= 4 => return Err(wrong(&format!("an array of {sizes:?}"))),
            _ => return Err(wrong("an array of another shape")),
        };
        let bytes = self.bytes_of(*data).ok_or_else(|| wrong("an array without bytes"))?;
        if rows.checked_mul(columns) != Some(bytes.len()) {
            return Err(wrong(&format!("an array of {rows} rows and {} bytes", bytes.len())));
        }
        Ok((rows, bytes))
    }

    /// A list or a vector of integers.
    pub fn integers(&self, key: &str) -> Result<Vec<i64>> {
        let numbers = match self.object(self.get(key)?) {
            Some(Object::List(values)) => {
                let integer = |value: &Value| match value {
                    Value::Integer(number) => Some(*number),
                    _ => None,
                };
                values.iter().map(integer).collect()
            }
            Some(Object::Array { shape, dtype, data }) => {
                let numbers = self.array_integers(*dtype, *data);
                numbers.filter(|numbers| self.shape(*shape).as_deref() == Some(&[numbers.len()]))
            }
            _ => None,
        };
        numbers.ok_or_else(|| self.error(format!("`{key}` is no list of integers")))
    }

    /// The numbers in the bytes of an array, if its type is an integer.
    fn array_integers(&self, dtype: Value, data: Value) -> Option<Vec<i64>> {
        let Object::Dtype { code, big_endian } = self.object(dtype)? else { return None };
        let (signed, width) = match code {
            [b'i', width] => (true, width),
            [b'u', width] => (false, width),
            _ => return None,
        };
        let width = match width {
            b'1' | b'2' | b'4' | b'8' => usize::from(width - b'0'),
            _ => return None,
        };
        super::integers(&self.bytes_of(data)?, width, signed, *big_endian)
    }
}
