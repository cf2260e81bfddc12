// A message type whose deserializer copies the message as it came, and whose serializer one that lies there in two
// parts: see single_copy.py. The structs are those of rosidl_runtime_c/message_type_support_struct.h and
// rosidl_typesupport_fastrtps_cpp/message_type_support.h.

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

struct callbacks {
    const char *namespace, *name;
    bool (*serialize)(const void *message, void *cdr);
    bool (*deserialize)(void *cdr, void *message);
    uint32_t (*size)(const void *message);
    void *largest_size;
    void *keys;  // in kilted; an image has none
};

struct support {
    const char *identifier;
    const struct callbacks *callbacks;
    const struct support *(*find)(const struct support *support, const char *identifier);
    void *description[3];  // since iron
};

struct single_copy {
    struct support support;  // first: it is asked for the others
    const struct support *original;
    struct support ours;
    struct callbacks callbacks;
};

struct message {
    uint8_t *data;
    size_t length;
    void *(*reallocate)(void *data, size_t bytes, void *state);
    void *state;
};

struct parts {
    const uint8_t *head, *body;
    size_t head_length, body_length;
};

// Methods of eprosima::fastcdr::Cdr: where a message starts; whether as many bytes are left, and then on by as many.
static char *(*start)(void *cdr);
static bool (*jump)(void *cdr, size_t bytes);

void sr_use(void *get_buffer_pointer, void *jump_by) {
    start = (char *(*)(void *))get_buffer_pointer;
    jump = (bool (*)(void *, size_t))jump_by;
}

static bool take_whole(void *cdr, void *untyped) {
    struct message *message = untyped;
    size_t length = 4;  // the encapsulation, which has been read
    // It may claim padding that is not there: less than nothing is left then, which Fast CDR takes for very much.
    if (!jump(cdr, SIZE_MAX / 2))
        for (size_t step = (size_t)1 << 31; step; step >>= 1)  // a payload's length has 32 bits
            if (jump(cdr, step)) length += step;
    void *data = message->reallocate(message->data, length, message->state);
    if (!data) return false;
    message->data = memcpy(data, start(cdr), length);
    message->length = length;
    return true;
}

static uint32_t parts_size(const void *untyped) {
    const struct parts *parts = untyped;
    return (uint32_t)(parts->head_length + parts->body_length);
}

static bool put_parts(const void *untyped, void *cdr) {
    const struct parts *parts = untyped;
    if (!jump(cdr, parts->head_length + parts->body_length)) return false;
    char *to = start(cdr) + 4;  // the encapsulation, which has been written
    memcpy(to, parts->head, parts->head_length);
    memcpy(to + parts->head_length, parts->body, parts->body_length);
    return true;
}

static const struct support *find(const struct support *support, const char *identifier) {
    const struct single_copy *own = (const struct single_copy *)support;
    return strcmp(identifier, own->ours.identifier) ? own->original->find(own->original, identifier) : &own->ours;
}

// A type support as `original`, of the message package::msg::name, but for what `identifier`'s middleware reads and
// writes messages with. NULL where that is not found or for another message. It is never freed: nobody knows who uses it.
const void *sr_single_copy(const struct support *original, const char *identifier, const char *namespace,
                           const char *name, bool described) {
    const struct support *theirs = original->find(original, identifier);
    if (!theirs || strcmp(theirs->identifier, identifier)) return NULL;
    if (strcmp(theirs->callbacks->namespace, namespace) || strcmp(theirs->callbacks->name, name)) return NULL;
    struct single_copy *own = calloc(1, sizeof *own);
    if (!own) return NULL;
    const size_t known = described ? sizeof(struct support) : offsetof(struct support, description);
    memcpy(&own->support, original, known);
    memcpy(&own->ours, theirs, known);
    memcpy(&own->callbacks, theirs->callbacks, offsetof(struct callbacks, keys));
    own->original = original;
    own->support.find = find;
    own->ours.callbacks = &own->callbacks;
    own->callbacks.deserialize = take_whole;
    own->callbacks.serialize = put_parts;
    own->callbacks.size = parts_size;
    return own;
}
