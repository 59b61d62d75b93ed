/* core/words.py in C: which 64-bit words of pages changed, and pages from them. What each function means is told there.
 *
 * Every length and every place is checked before anything is read or written.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>
#include <string.h>

enum { PAGE = 4096, WORDS = PAGE / 8, MASK = WORDS / 8 };

static const uint64_t zeros[WORDS];

/* The pages' places in the store, and which of them hold what was sent last. */
typedef struct {
    Py_ssize_t count;
    uint64_t *store;
    const int64_t *places;
    const uint8_t *known;
} Places;

static int read_places(Places *places, const Py_buffer *store, const Py_buffer *numbers, const Py_buffer *known) {
    places->count = numbers->len / (Py_ssize_t)sizeof(int64_t);
    places->store = store->buf;
    places->places = numbers->buf;
    places->known = known->buf;
    if (known->len != places->count) {
        PyErr_SetString(PyExc_ValueError, "not one flag a place");
        return 0;
    }
    for (Py_ssize_t i = 0; i < places->count; i++) {
        if (places->places[i] < 0 || places->places[i] >= store->len / PAGE) {
            PyErr_SetString(PyExc_ValueError, "a place outside the store");
            return 0;
        }
    }
    return 1;
}

static uint64_t *remembered(const Places *places, Py_ssize_t i) {
    return places->store + places->places[i] * WORDS;
}

static const uint64_t *contents_before(const Places *places, Py_ssize_t i) {
    return places->known[i] ? remembered(places, i) : zeros;
}

/* Writes the page's mask, and its changed words to `out`, where there is room for one more. Returns the next free. */
static uint64_t *changes(const uint64_t *now, const uint64_t *before, uint8_t *mask, uint64_t *out) {
    for (int line = 0; line < MASK; line++, now += 8, before += 8) {
        uint64_t differs = 0;
        for (int word = 0; word < 8; word++)
            differs |= now[word] ^ before[word];
        mask[line] = 0;
        if (!differs)
            continue;
        for (int word = 0; word < 8; word++) {
            unsigned is_changed = now[word] != before[word];
            mask[line] |= (uint8_t)(is_changed << (7 - word));
            *out = now[word];
            out += is_changed;
        }
    }
    return out;
}

static PyObject *shrink(PyObject *module, PyObject *arguments) {
    Py_buffer pages, store, numbers, known, sent, masks, words;
    PyObject *result = NULL;
    Places places;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "y*w*y*y*w*w*w*:shrink", &pages, &store, &numbers, &known, &sent, &masks, &words))
        return NULL;
    if (!read_places(&places, &store, &numbers, &known))
        goto done;
    if (pages.len != places.count * PAGE || sent.len != places.count || masks.len != places.count * MASK
        || words.len != (places.count * WORDS + 1) * (Py_ssize_t)sizeof(uint64_t)) {
        PyErr_SetString(PyExc_ValueError, "the buffers do not fit the number of pages");
        goto done;
    }
    const uint64_t *now = pages.buf;
    uint8_t *is_sent = sent.buf, *mask = masks.buf;
    uint64_t *first = words.buf, *next = first;
    /* All are compared before any is remembered: two of them may have one place. */
    for (Py_ssize_t i = 0; i < places.count; i++) {
        uint64_t *end = changes(now + i * WORDS, contents_before(&places, i), mask, next);
        is_sent[i] = !places.known[i] || end != next;
        mask += is_sent[i] ? MASK : 0;
        next = end;
    }
    for (Py_ssize_t i = 0; i < places.count; i++)
        if (is_sent[i])
            memcpy(remembered(&places, i), now + i * WORDS, PAGE);
    result = PyLong_FromSsize_t(next - first);
done:
    PyBuffer_Release(&pages);
    PyBuffer_Release(&store);
    PyBuffer_Release(&numbers);
    PyBuffer_Release(&known);
    PyBuffer_Release(&sent);
    PyBuffer_Release(&masks);
    PyBuffer_Release(&words);
    return result;
}

static Py_ssize_t count_bits(const uint8_t *masks, Py_ssize_t length) {
    Py_ssize_t count = 0;
    for (Py_ssize_t i = 0; i < length; i++)
        count += __builtin_popcount(masks[i]);
    return count;
}

/* `words` come from the wire, wherever they lie there. */
static const uint8_t *put_in(uint64_t *page, const uint8_t *mask, const uint8_t *words) {
    for (int line = 0; line < MASK; line++, page += 8)
        if (mask[line])
            for (int word = 0; word < 8; word++)
                if (mask[line] & (0x80 >> word)) {
                    memcpy(page + word, words, sizeof(uint64_t));
                    words += sizeof(uint64_t);
                }
    return words;
}

static PyObject *grow(PyObject *module, PyObject *arguments) {
    Py_buffer masks, words, store, numbers, known, pages;
    PyObject *result = NULL;
    Places places;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "y*y*w*y*y*w*:grow", &masks, &words, &store, &numbers, &known, &pages))
        return NULL;
    if (!read_places(&places, &store, &numbers, &known))
        goto done;
    if (pages.len != places.count * PAGE || masks.len != places.count * MASK
        || count_bits(masks.buf, masks.len) * (Py_ssize_t)sizeof(uint64_t) != words.len) {
        PyErr_SetString(PyExc_ValueError, "the buffers do not fit the number of pages and words");
        goto done;
    }
    uint64_t *page = pages.buf;
    const uint8_t *next = words.buf;
    for (Py_ssize_t i = 0; i < places.count; i++) {
        memcpy(page + i * WORDS, contents_before(&places, i), PAGE);
        next = put_in(page + i * WORDS, (const uint8_t *)masks.buf + i * MASK, next);
    }
    for (Py_ssize_t i = 0; i < places.count; i++)
        memcpy(remembered(&places, i), page + i * WORDS, PAGE);
    result = Py_NewRef(Py_None);
done:
    PyBuffer_Release(&masks);
    PyBuffer_Release(&words);
    PyBuffer_Release(&store);
    PyBuffer_Release(&numbers);
    PyBuffer_Release(&known);
    PyBuffer_Release(&pages);
    return result;
}

static PyMethodDef methods[] = {
    {"shrink", shrink, METH_VARARGS, "(pages, store, places, known, sent, masks, words) -> number of words"},
    {"grow", grow, METH_VARARGS, "(masks, words, store, places, known, pages)"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_words", "See words.py.", 0, methods,
                                        NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__words(void) {
    return PyModuleDef_Init(&definition);
}
