"""A reader of `.tersor` files, format version 2, written from docs/format.md and nothing else: whole numbers,
Python's own library, no import of Tersor, numpy or onnx. Slow, and it refuses nothing: it takes right files only."""

import hashlib
import json
import lzma
import math
import struct

SIZES = {
    "bool": 1,
    "float16": 2,
    "float32": 4,
    "float64": 8,
    "int8": 1,
    "int32": 4,
    "int64": 8,
    "uint8": 1,
}
# ONNX's numbers of the types (TensorProto.DataType).
ONNX = {
    1: "float32",
    2: "uint8",
    3: "int8",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    11: "float64",
}


def read(data):
    """header (dict), the ModelProto's bytes, {name: (type, shape, bytes)}; the state's under state/NAME."""
    magic, version, head_bytes, total = struct.unpack_from("<8sIIQ", data, 0)
    assert (magic, version, total) == (b"\x89TERSOR\n", 2, len(data))
    head = data[56 : 56 + head_bytes]
    assert data[24:56] == hashlib.sha256(data[:24] + head).digest()
    place = Place(head)
    size = place.varint()
    header = json.loads(unsqueeze(place.rest()))
    assert size == len(json.dumps(header, sort_keys=True, separators=(",", ":")))
    sections, at = [], 56 + head_bytes
    for size in (header["skeleton"]["size_bytes"], *header["sizes"]):
        sections.append(data[at : at + size])
        at += size
    assert at == len(data)
    check_digests(sections, header["digests"])
    columns = unsqueeze(sections[0])
    assert len(columns) == header["skeleton"]["columns_bytes"]
    skeleton = expand(columns)
    assert len(skeleton) == header["skeleton"]["decoded_bytes"]
    kinds = initializers(skeleton)
    for name, (kind, shape) in sorted(header["state"].items()):
        kinds[f"state/{name}"] = kind, tuple(shape)
    names, found = list(kinds), {}
    for name, way, section in zip(names, header["encodings"], sections[1:], strict=True):
        kind, shape = kinds[name]
        if way != "derived":
            found[name] = WAYS[way](Place(section), shape, kind)
    for name, way, section in zip(names, header["encodings"], sections[1:], strict=True):
        if way == "derived":
            found[name] = derived(Place(section), [found.get(each) for each in names])
    return header, skeleton, {name: (*kinds[name], found[name]) for name in names}


def check_digests(sections, digests):
    digests, group = iter(digests), b""
    for number, section in enumerate(sections):
        group += section
        if len(group) >= 4096 or number == len(sections) - 1:
            assert next(digests) == hashlib.sha256(group).hexdigest()[:16]
            group = b""
    assert next(digests, None) is None


def unsqueeze(data):
    filters = [{"id": lzma.FILTER_LZMA1, "dict_size": 1 << 22, "lc": 3, "lp": 0, "pb": 0}]
    stream = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=filters)
    found = stream.decompress(data)
    assert stream.eof and not stream.unused_data
    return found


class Place:
    """A place in bytes."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, size):
        self.at += size
        assert self.at <= len(self.data)
        return self.data[self.at - size : self.at]

    def byte(self):
        return self.take(1)[0]

    def varint(self):
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    def rest(self):
        return self.take(len(self.data) - self.at)

    def numbers(self):
        return [self.varint() for _ in range(self.varint())]

    def texts(self):
        return [self.take(size) for size in self.numbers()]

    def streams(self):
        sizes = [self.varint() for _ in range(self.varint())]
        return [self.take(size) for size in sizes] + [self.rest()]


# The skeleton


def varint(value):
    data = b""
    while value > 127:
        data += bytes([value & 127 | 128])
        value >>= 7
    return data + bytes([value])


def field(number, content):
    return varint(number << 3 | 2) + varint(len(content)) + content


def fields(data):
    place = Place(data)
    while place.at < len(data):
        tag = place.varint()
        if tag & 7 == 0:
            yield tag >> 3, place.varint()
        else:
            yield tag >> 3, place.take(place.varint() if tag & 7 == 2 else {1: 8, 5: 4}[tag & 7])


def initializers(skeleton):
    (graph,) = (content for number, content in fields(skeleton) if number == 7)
    found = {}
    for number, content in fields(graph):
        if number == 5:
            held = list(fields(content))
            dims = tuple(value for key, value in held if key == 1)
            found[dict(held)[8].decode()] = ONNX[dict(held)[2]], dims
    return found


def expand(columns):
    place = Place(columns)
    if place.byte() == 0:
        return place.rest()
    rest, forms, kinds = place.texts(), place.texts(), place.texts()
    shared, suffixes, own = place.numbers(), place.texts(), iter(place.texts())
    dims = iter(place.numbers())
    form, inputs, outputs, places, naming, initial, values = (place.numbers() for _ in range(7))
    names, before = [], b""
    for keep, suffix in zip(shared, suffixes, strict=True):
        before = before[:keep] + suffix
        names.append(before)
    graph, known, places = b"", 0, iter(places)
    for number, ins, outs, how in zip(form, inputs, outputs, naming, strict=True):
        used = []
        for _ in range(ins + outs):
            back = next(places)
            used.append(names[known - back])
            known += back == 0
        node = b"".join(field(1 if i < ins else 2, name) for i, name in enumerate(used))
        if how:
            operator = dict(fields(forms[number]))[4] if how == 1 else b""
            node += field(3, used[ins] + b"_" + operator if how == 1 else next(own))
        graph += field(1, node + forms[number])
    graph, last = graph + rest[1], -1
    for delta in initial:
        last += 1 + signed(delta)
        kind = next(dims)
        shape = b"".join(b"\x08" + varint(next(dims)) for _ in range(next(dims)))
        graph += field(5, shape + b"\x10" + varint(kind) + field(8, names[last]))
    graph, last, values = graph + rest[2], -1, iter(values)
    for delta in values:
        last += 1 + signed(delta)
        graph += field(13, field(1, names[last]) + kinds[next(values)])
    return rest[0] + field(7, graph + rest[3]) + rest[4]


def signed(value):
    return -(value + 1) // 2 if value % 2 else value // 2


# Entropy coding


class Stream:
    """The streams of a section, read symbol by symbol."""

    def __init__(self, streams):
        self.left = streams[::-1]
        self.open()

    def open(self):
        data = self.left.pop()
        data += bytes(-len(data) % 4)
        self.words = list(struct.unpack(f"<{len(data) // 4}I", data))
        self.state = self.count = 0
        self.fill()

    def fill(self):
        while self.state < 1 << 32 and self.words:
            self.state = self.state << 32 | self.words.pop()

    def boundary(self):
        if self.count >= 1 << 21:
            self.close()
            self.open()

    def close(self):
        assert self.state == 0 and not self.words

    def finish(self):
        self.close()
        assert not self.left

    def step(self, start, end):
        self.state = (self.state >> 24) * (end - start) + self.state % (1 << 24) - start
        self.count += 1
        self.fill()

    def symbol(self, frequency):
        size, place, end = len(frequency), self.state % (1 << 24), 0
        total = 0
        for symbol, value in enumerate(frequency):
            start = end
            total += value
            end = (total * ((1 << 24) - size) >> 16) + symbol + 1
            if symbol == size - 1:
                end = 1 << 24
            if place < end:
                self.step(start, end)
                return symbol
        raise AssertionError("a table covers all places")

    def uniform(self, size):
        share = (1 << 24) // size
        symbol = self.state % (1 << 24) // share
        self.step(symbol * share, (symbol + 1) * share)
        return symbol


class Counts:
    """Tables, one a context."""

    def __init__(self, prior, limit):
        self.counts = [list(row) for row in prior]
        self.limit = 32 * limit
        self.tables = [frequencies(row) for row in self.counts]

    def read(self, stream, contexts):
        """One symbol a context, all under the tables as they are; then count them."""
        found = [stream.symbol(self.tables[context]) for context in contexts]
        self.count(contexts, found)
        return found

    def count(self, contexts, symbols):
        for context, symbol in zip(contexts, symbols, strict=True):
            self.counts[context][symbol] += 32
        for context in set(contexts):
            self.refresh(context)

    def refresh(self, context):
        row = self.counts[context]
        while sum(row) > self.limit:
            row[:] = [(value + 1) >> 1 for value in row]
        self.tables[context] = frequencies(row)


def frequencies(counts):
    size, total, cumulated, before, found = len(counts), sum(counts), 0, 0, []
    for number, value in enumerate(counts, 1):
        cumulated += value
        end = cumulated * (65536 - size) // total + number
        found.append(end - before)
        before = end
    return found


class Run:
    """Symbols under one table, in runs that grow."""

    def __init__(self, counts):
        self.table = Counts([counts], 1 << 22)
        self.length = self.left = 48

    def read(self, stream, number):
        found = []
        for _ in range(number):
            symbol = stream.symbol(self.table.tables[0])
            self.table.counts[0][symbol] += 32
            found.append(symbol)
            self.left -= 1
            if not self.left:
                self.table.refresh(0)
                self.length = self.left = min(self.length * 3 // 2, 1 << 17)
                stream.boundary()
        return found


# The ways to store a tensor: a place and what is known of the tensor, to the tensor's bytes


def elements(shape):
    return math.prod(shape)


def dense(place, shape, kind):
    return place.rest()


def bitmap(place, shape, kind):
    number = elements(shape)
    mask = place.take((number + 7) // 8)
    zero = bytes(SIZES[kind])
    return b"".join(
        place.take(SIZES[kind]) if mask[i // 8] >> i % 8 & 1 else zero for i in range(number)
    )


def packed(place, shape, kind):
    bits, lowest = place.byte(), place.byte()
    whole = int.from_bytes(place.rest(), "little")
    mask = (1 << bits) - 1
    return bytes(lowest + (whole >> bits * i & mask) & 255 for i in range(elements(shape)))


def codebook(place, shape, kind):
    levels = [place.take(SIZES[kind]) for _ in range(place.byte() + 1)]
    return b"".join(levels[i] for i in codes(Place(place.rest()), shape, "uint8"))


def planes(place, shape, kind):
    size, number, found = SIZES[kind], elements(shape), []
    for plane in range(size):
        length = place.varint()
        form = shape if plane == 0 else (number,)
        data = place.take(length or number)
        found.append(codes(Place(data), form, "uint8") if length else data)
    words = [int.from_bytes(parts, "big") for parts in zip(*found, strict=True)]
    if kind.startswith("float"):
        words = [word >> 1 | (word & 1) << (8 * size - 1) for word in words]
    return b"".join(word.to_bytes(size, "little") for word in words)


def sparse(place, shape, kind):
    stored = codes(Place(place.take(place.varint())), shape, "bool")
    inner = (dense, planes, integers)[place.byte()]
    values = Place(inner(Place(place.rest()), (sum(stored),), kind))
    zero = bytes(SIZES[kind])
    return b"".join(values.take(SIZES[kind]) if held else zero for held in stored)


def integers(place, shape, kind):
    shift, longest = place.byte(), place.byte()
    stream, number, found, run = Stream(place.streams()), elements(shape), [], 48
    if longest:
        lengths = Counts([[2] * (longest + 1)], 1 << 20)
        signs = Counts([[32, 32]], 1 << 20)
        seconds = Counts([[128, 128]] * (longest + 1), 1 << 20)
    while longest and len(found) < number:
        part = min(run, number - len(found))
        length = lengths.read(stream, [0] * part)
        negative = signs.read(stream, [0] * sum(map(bool, length)))
        bits = seconds.read(stream, [size for size in length if size > 1])
        bits = iter(bits)
        values = [size if size < 2 else 2 + next(bits) for size in length]
        rest = [max(size - 2, 0) for size in length]
        while any(rest):
            for i in range(part):
                if rest[i]:
                    now = min(rest[i], 16)
                    rest[i] -= now
                    values[i] = values[i] << now | stream.uniform(1 << now)
        negative = iter(negative)
        found += [-value if value and next(negative) else value for value in values]
        run = min(run * 3 // 2, 1 << 16)
        stream.boundary()
    stream.finish()
    found = found or [0] * number
    return b"".join((v << shift).to_bytes(SIZES[kind], "little", signed=True) for v in found)


def derived(place, tensors):
    if place.byte() == 0:
        return tensors[place.varint()]
    scalar, tensor = tensors[place.varint()], tensors[place.varint()]
    (factor,) = struct.unpack("<f", scalar)
    values = struct.unpack(f"<{len(tensor) // 4}f", tensor)
    # the product of two float32 is exact in float64
    return struct.pack(f"<{len(values)}f", *(factor * value for value in values))


def codes(place, shape, kind):
    """The elements' bytes."""
    form, lowest = place.byte(), place.byte()
    number = elements(shape)
    if form == 0:
        return bytes([lowest] * number)
    span = place.byte()
    found = (runs if form == 1 else context)(place, shape, span)
    return bytes((lowest + above) & 255 for above in found)


def runs(place, shape, span):
    num_rows = shape[0] if len(shape) > 1 and shape[0] <= 1 << 16 else 1
    columns = elements(shape) // num_rows
    num_classes = place.byte() + 1
    stream = Stream(place.streams())
    classes = [0] * num_rows
    if num_classes > 1:
        classes = Run([2] * num_classes).read(stream, num_rows)
    rows, run = [None] * num_rows, Run([2] * (span + 1))
    for number in range(num_classes):
        for row in range(num_rows):
            if classes[row] == number:
                rows[row] = run.read(stream, columns)
        counts = run.table.counts[0]
        run = Run([max(1, value * 8192 // sum(counts)) for value in counts])
    stream.finish()
    return [value for row in rows for value in row]


WAYS = {
    "dense": dense, "bitmap": bitmap, "packed": packed, "codebook": codebook, "planes": planes,
    "sparse": sparse, "integers": integers, "codes": codes,
}  # fmt: skip


# Codes in context

FIRST, WIDTH = list(range(1, 9)), [1] * 8
for _octave in range(5):
    for _ in range(4):
        FIRST.append(FIRST[-1] + WIDTH[-1])
        WIDTH.append(2 << _octave)
ENERGY = (1, 50, 90, 140, 220)
PREDICTION = (1, 4, 10, 20, 35, 55, 80, 120, 180)
FLAG_LEVEL = (0, 0, 0, 1, 1, 2, 2, 3, 3, 3)
SIZE_LEVEL = ((3, 3, 3, 4, 4, 5, 6, 6, 7, 8), (3, 3, 3, 2, 2, 1, 1, 0, 0, 0))
MANTISSA = [round(64 * math.log2(1 + (i + 0.5) / 256)) for i in range(256)]


def log2(value):
    exponent = value.bit_length() - 1
    return 64 * exponent + MANTISSA[(value << 8 >> exponent) - 256]


def half_octaves(steps):
    return math.isqrt(1 << (64 + steps))


def clamp(value, most):
    return min(max(value, 0), most)


def context(place, shape, span):
    center, flags = place.byte(), place.byte()
    stream = Stream(place.streams())
    walk = Walk(shape, flags, max(center, span - center))
    if flags & 16:
        walk.read_weights(stream)
    if flags & 8:
        walk.read_columns(stream)
    for start, end in blocks(walk.rows, walk.channels):
        walk.block(stream, start, end)
        stream.boundary()
    stream.finish()
    return [center + value for value in walk.found]


def blocks(rows, channels):
    most, start, size = max(1, min(8192 // channels, rows // 8)), 0, 1
    while start < rows:
        end = min(start + size, rows)
        yield start, end
        start, size = end, min(most, max(size + 1, size * 3 // 2))


class Sums:
    def __init__(self, channels, positions, relative):
        self.relative = relative
        self.column = [[0] * channels for _ in range(positions)]
        self.column_count = [[0] * channels for _ in range(positions)]
        self.channel, self.channel_count = [0] * channels, [0] * channels
        self.whole, self.whole_count = 1, 2

    def begin(self, rows):
        self.row, self.row_count, self.expected = [0] * rows, [0] * rows, [0] * rows

    def mean(self):
        return max(1, (self.whole << 16) // self.whole_count)

    def terms(self, position):
        mean = self.mean()
        level = log2(mean)
        self.columns, per_channel = [], []
        for c, (total, number) in enumerate(zip(self.channel, self.channel_count, strict=True)):
            channel = ((total << 16) + 32 * mean) // (number + 32)
            held = (self.column[position][c] << 16) + 12 * channel
            column = held // (self.column_count[position][c] + 12)
            self.columns.append(column)
            by_column, by_channel = log2(max(column, 1)) - level, log2(max(channel, 1)) - level
            per_channel.append((8 * by_column + 5 * by_channel) >> 4)
        per_row = []
        for total, number, expected in zip(self.row, self.row_count, self.expected, strict=True):
            row = (total << 16) + 3 * mean
            if self.relative:
                per_row.append(level + log2(row) - log2(expected + 3 * mean))
            else:
                per_row.append(log2(max(row // (number + 3), 1)))
        return per_row, per_channel

    def add(self, position, r, c, value, number):
        self.row[r] += value
        self.row_count[r] += number
        for held, counts in (
            (self.column[position], self.column_count[position]),
            (self.channel, self.channel_count),
        ):
            held[c] += value
            counts[c] += number
        self.whole += value
        self.whole_count += number


class Walk:
    def __init__(self, shape, flags, largest):
        turned, self.flags = bool(flags & 1), flags
        kernel = elements(shape[2:])
        self.width = shape[-1] if len(shape) > 2 and 1 < kernel <= 64 else 0
        sides = (shape[0], shape[1]) if self.width else (shape[0], elements(shape[1:]))
        self.rows, columns = sides[::-1] if turned else sides
        if self.width:
            self.channels, self.positions = columns, kernel
        else:
            self.positions = next(p for p in range(8, 0, -1) if columns % p == 0)
            self.channels = columns // self.positions
        self.turned, self.sides = turned, sides
        self.found = [0] * elements(shape)
        dense, symbol = bool(flags & 2), max(i for i in range(len(FIRST)) if FIRST[i] <= largest)
        one = 8 if dense else 24
        self.offset = 32 * one - 1008
        self.flag_counts = Counts(flag_prior(one), 8192)
        self.sign_counts = Counts([[128, 128]] * 10, 8192)
        self.size_counts = Counts(size_prior(symbol), 8192)
        self.stripe_counts = Counts([[32, 32]] * (2 * self.positions), 8192)
        self.live_columns = [[1] * self.channels for _ in range(self.positions)]
        self.active = Sums(self.channels, self.positions, True)
        self.extent = Sums(self.channels, self.positions, False)
        self.totals = [[0] * self.channels for _ in range(self.positions)]
        self.done = 0
        self.near = [self.neighbours(p) for p in range(self.positions)]
        self.weights = [[0] * len(near) for near in self.near]
        self.by_column = self.by_row = 0

    def neighbours(self, position):
        def away(p):
            y, x = divmod(position, self.width)
            return (p // self.width - y) ** 2 + (p % self.width - x) ** 2

        known = range(position) if self.width else ()
        return sorted(known, key=lambda p: (away(p), -p))[:8]

    def read_weights(self, stream):
        prior = [1 + (512 >> abs(value) // 6) for value in range(-128, 128)]
        table = frequencies(prior)
        for weights in self.weights:
            weights[:] = [stream.symbol(table) - 128 for _ in weights]
        self.by_column, self.by_row = (stream.symbol(table) - 128 for _ in range(2))

    def read_columns(self, stream):
        counts, before = Counts([[32, 32]] * 2, 8192), [1] * self.channels
        for position in range(self.positions):
            before = self.live_columns[position] = counts.read(stream, before)

    def block(self, stream, start, end):
        rows = end - start
        self.active.begin(rows)
        self.extent.begin(rows)
        self.row_totals, self.row_coded = [0] * rows, 0
        self.live, self.history = [1] * rows, []
        mean = self.extent.mean() + 65536
        self.energy_bounds = [-(-step * mean // (100 << 16)) for step in ENERGY]
        self.bounds = [-(-step * mean * 128 // (100 << 16)) for step in PREDICTION]
        for position in range(self.positions):
            values = self.step(stream, position, rows)
            for r in range(rows):
                for c in range(self.channels):
                    self.found[self.index(start + r, position, c)] = values[r][c]
        self.done += rows

    def index(self, r, p, c):
        if self.width:
            first, second = (c, r) if self.turned else (r, c)
            return (first * self.sides[1] + second) * self.positions + p
        column = c * self.positions + p
        first, second = (column, r) if self.turned else (r, column)
        return first * self.sides[1] + second

    def step(self, stream, p, rows):
        if self.flags & 4:
            self.live = self.stripe_counts.read(stream, [2 * p + live for live in self.live])
        row_terms, channel_terms = self.active.terms(p)
        predicted = [[self.predict(p, r, c) for c in range(self.channels)] for r in range(rows)]
        lanes = [
            (r, c)
            for r in range(rows)
            if self.live[r]
            for c in range(self.channels)
            if self.live_columns[p][c]
        ]
        levels, contexts = {}, []
        for r, c in lanes:
            size = min(abs(predicted[r][c]) >> 3, (1 << 14) - 1)
            level = levels[r, c] = sum(size >= bound for bound in self.bounds)
            scale = clamp((row_terms[r] + self.offset + channel_terms[c]) >> 5, 31)
            energy = sum(self.energy(p, r, c) >= bound for bound in self.energy_bounds)
            contexts.append(scale + 32 * FLAG_LEVEL[level] + 128 * energy)
        flags = self.flag_counts.read(stream, contexts)
        lanes = [lane for lane, flag in zip(lanes, flags, strict=True) if flag]
        values = [[0] * self.channels for _ in range(rows)]
        signs = self.sign_counts.read(stream, [levels[lane] for lane in lanes])
        row_terms, channel_terms = self.extent.terms(p)
        contexts = []
        for (r, c), sign in zip(lanes, signs, strict=True):
            scale = clamp((row_terms[r] - 752 + channel_terms[c]) >> 5, 23)
            contexts.append(scale + 24 * SIZE_LEVEL[sign][levels[r, c]])
        symbols = self.size_counts.read(stream, contexts)
        for (r, c), sign, symbol in zip(lanes, signs, symbols, strict=True):
            low = stream.uniform(WIDTH[symbol]) if WIDTH[symbol] > 1 else 0
            negative = (sign == 1) != (predicted[r][c] < 0)
            values[r][c] = -(FIRST[symbol] + low) if negative else FIRST[symbol] + low
        self.take(p, values)
        return values

    def predict(self, p, r, c):
        column = (self.totals[p][c] << 4) // (self.done + 2)
        row = (self.row_totals[r] << 4) // (self.row_coded + 8)
        near = zip(self.weights[p], self.near[p], strict=True)
        kernel = sum(16 * weight * self.history[place][r][c] for weight, place in near)
        return self.by_row * row + self.by_column * column + kernel

    def energy(self, p, r, c):
        backs = {1, self.width} if self.width else ()
        return sum(abs(self.history[p - back][r][c]) for back in backs if p >= back)

    def take(self, p, values):
        expected = sum(self.active.columns)
        for r, row in enumerate(values):
            for c, value in enumerate(row):
                held = int(value != 0)
                size = min(abs(value), 15) if self.flags & 2 else held
                self.active.add(p, r, c, size, self.live[r])
                self.extent.add(p, r, c, abs(value) - held, held)
                self.totals[p][c] += value
                self.row_totals[r] += value
            self.active.expected[r] += expected * self.live[r]
        self.row_coded += self.channels
        self.history.append(values)


def flag_prior(one):
    rows = []
    for scale in range(32):
        mean = half_octaves(scale - one)
        held = min(max(mean * 192 // (mean + (1 << 32)), 1), 191)
        rows.append([192 - held, held])
    return rows * 24


def size_prior(largest):
    rows = []
    for scale in range(24):
        mean, left, row = half_octaves(scale - 8), 1 << 32, []
        for width in WIDTH[: largest + 1]:
            kept = left
            for _ in range(width):
                kept = kept * mean // (mean + (1 << 32))
            row.append(1 + ((left - kept) * 640 >> 32))
            left = kept
        rows.append(row if len(row) > 1 else [*row, 1])
    return rows * 9
